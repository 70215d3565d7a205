"""Peak memory of this process."""

import sys
from pathlib import Path

import torch


def peak_bytes(device: torch.device) -> int:
    """Most memory held so far: on the GPU as torch counts it, else resident in this process.

    On Linux the kernel's high-water mark of this process's own address space is read, since the
    usual ``ru_maxrss`` starts from the peak of the process that launched it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
