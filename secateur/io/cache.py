"""The user's cache folder, for measurements that can be repeated."""

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import platformdirs

from secateur.io.run_directory import write_whole


def cached_file(kind: str, identity: dict[str, Any]) -> Path:
    """The cache file for data of a kind that ``identity`` determines."""
    text = json.dumps(identity, sort_keys=True)
    folder = platformdirs.user_cache_path("secateur") / kind
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


def keep(path: Path, text: str) -> None:
    """Write a file to the cache. If that is not possible, print a note and continue."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    except OSError as error:
        warnings.warn(f"nothing was kept in {str(path.parent)!r}: {error.strerror}", stacklevel=2)
