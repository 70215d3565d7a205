"""How much memory this process may still take."""

import resource
from pathlib import Path

import psutil
import torch

CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """The least of what the device has left and what limits on this process leave of it."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [int(psutil.virtual_memory().available)]
    own = psutil.Process().memory_info()
    for kind, used in ((resource.RLIMIT_DATA, own.rss), (resource.RLIMIT_AS, own.vms)):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY:
            found.append(limit - used)
    group = (_number(CGROUP / "memory.max"), _number(CGROUP / "memory.current"))
    if None not in group:
        found.append(group[0] - group[1])  # type: ignore[operator]
    return max(0, min(found))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return None
