"""The user's cache folder: what was measured once and can be measured again."""

import hashlib
import json
from pathlib import Path
from typing import Any

import platformdirs


def cached_file(kind: str, identity: dict[str, Any]) -> Path:
    """The file for something of a kind that ``identity`` determines; its folder exists."""
    text = json.dumps(identity, sort_keys=True)
    folder = platformdirs.user_cache_path("secateur") / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
