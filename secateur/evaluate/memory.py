"""Peak memory of this process."""

import sys
from pathlib import Path

import torch


def peak_bytes(device: torch.device) -> int:
    """Peak memory: allocated by PyTorch on a GPU, otherwise resident memory of this process.

    On Linux, the kernel's high-water mark of this process's address space is used, because
    ``ru_maxrss`` starts at the peak of the parent process.
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
