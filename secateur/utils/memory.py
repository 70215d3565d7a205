"""How much memory this process may still take."""

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
    """The least of what the device has left and what limits on this process leave of it."""
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
    """From now on, let the system have the memory of large tensors as soon as they are gone.

    glibc's allocator keeps what is below 32 MB for later, between what stays: where blocks come and
    go, more with each of them. For the whole process; no other allocator is changed.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(MMAP_THRESHOLD, OWN)


def _groups() -> Iterator[int]:
    """What is left in each control group around this process that has a limit.

    What its files have in memory counts as free where nobody has used it lately.
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
