"""Files that several processes may be writing at once, and what killed ones have left of them."""

import os
import platform
import re
from pathlib import Path

import psutil


def own_partial(path: Path) -> Path:
    """Under which name this process writes a file until it is whole: no other one has it.

    Process numbers are those of one machine, or one container, so that is in it, too.
    """
    return path.with_suffix(f".{_host()}.{os.getpid()}.partial")


def remove_partials(folder: Path, names: str, host: bool = True) -> None:
    """Remove what processes that are gone were writing, under names that match a pattern.

    ``host``: only what has this machine's name in it, as :func:`own_partial` gives it.
    """
    for path in folder.glob(f"{names}.{f'{_host()}.' if host else ''}*.partial"):
        number = path.name.split(".")[-2]
        if number.isdecimal() and len(number) < 10 and not psutil.pid_exists(int(number)):
            path.unlink(missing_ok=True)


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", platform.node()) or "here"
