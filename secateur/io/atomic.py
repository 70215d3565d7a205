"""Names of partially written files, and removal of those that killed processes left behind."""

import os
import platform
import re
from pathlib import Path

import psutil


def own_partial(path: Path) -> Path:
    """The temporary name under which this process writes a file; no other process uses it.

    The name contains the host name, because process ids are unique per machine or container only.
    """
    return path.with_suffix(f".{_host()}.{os.getpid()}.partial")


def remove_partials(folder: Path, names: str, host: bool = True) -> None:
    """Remove temporary files of processes that no longer exist.

    With ``host``, only files with the name of this machine are removed; see :func:`own_partial`.
    """
    for path in folder.glob(f"{names}.{f'{_host()}.' if host else ''}*.partial"):
        number = path.name.split(".")[-2]
        if number.isdecimal() and len(number) < 10 and not psutil.pid_exists(int(number)):
            path.unlink(missing_ok=True)


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", platform.node()) or "here"
