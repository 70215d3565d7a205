"""How much memory this process can still use."""

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

CGROUP = Path("/sys/fs/cgroup")
MEMBER = Path("/proc/self/cgroup")
MMAP_THRESHOLD, OWN = -3, 2**20  # glibc's name for the bytes from which memory is one's own


def free_bytes(device: torch.device) -> int:
    """Free memory of a device, taking limits on this process into account."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    process = psutil.Process()
    own = process.memory_info()
    found = [int(psutil.virtual_memory().available)]
    if hasattr(process, "rlimit"):  # not on every system
        for kind, used in ((psutil.RLIMIT_DATA, own.rss), (psutil.RLIMIT_AS, own.vms)):
            limit = process.rlimit(kind)[0]
            if limit != psutil.RLIM_INFINITY:
                found.append(limit - used)
    return max(0, min([*found, *_groups()]))


def give_back() -> None:
    """Make glibc return the memory of large tensors to the system as soon as they are freed.

    Otherwise glibc keeps freed memory below 32 MB, and the process grows with every block that is
    loaded and freed. This affects the whole process; other allocators are not changed.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(MMAP_THRESHOLD, OWN)


def _groups() -> Iterator[int]:
    """Free memory of each control group around this process that has a limit.

    The file cache counts as free where it was not used recently.
    """
    try:
        own = CGROUP / MEMBER.read_text().rpartition("0::/")[2].partition("\n")[0]
    except OSError:
        return
    for folder in (own, *own.parents):
        try:
            limit, used = (int((folder / f"memory.{n}").read_text()) for n in ("max", "current"))
            figures = dict(line.split() for line in (folder / "memory.stat").open())
        except (OSError, ValueError):  # no such group, or no limit: "max"
            continue
        yield limit - used + int(figures.get("inactive_file", 0))
