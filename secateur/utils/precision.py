"""Where to compute in float64: on the device, or on the CPU if the device has no float64 (MPS)."""

import torch
from torch import Tensor

from secateur.utils.errors import InputError


def exact_device(device: torch.device) -> torch.device:
    """The device on which float64 tensors of a device are computed."""
    return torch.device("cpu") if device.type == "mps" else device


def exact(values: Tensor) -> Tensor:
    """Convert a tensor to float64 on a device that supports it; no copy if it is one already."""
    return values.to(exact_device(values.device)).double()  # moved first: only then it can be done


def check_exact(device: torch.device, what: str) -> None:
    """Refuse a device without float64 for a feature that needs it.

    Raises:
        InputError: it has none.
    """
    if exact_device(device) != device:
        raise InputError(f"--device {device}: {what} needs a CPU or a CUDA GPU. Try --device cpu.")
