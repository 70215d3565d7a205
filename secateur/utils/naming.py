"""Short names of models."""

import re
from pathlib import PurePath


def hub_id(source: str) -> str | None:
    """The source if it has the format of a hub id, otherwise None."""
    known = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source)
    return source if known and not source.startswith(("./", "../", "~")) else None


def short_name(source: str) -> str:
    """The hub id, or the last part of a path."""
    return hub_id(source) or PurePath(source).name or source
