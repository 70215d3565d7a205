"""What a model is called where its folder is of no interest."""

import re
from pathlib import PurePath


def hub_id(source: str) -> str | None:
    """The source, if it is written as a hub id is."""
    known = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source)
    return source if known and not source.startswith(("./", "../", "~")) else None


def short_name(source: str) -> str:
    """A hub id as it is, of a path its last part."""
    return hub_id(source) or PurePath(source).name or source
