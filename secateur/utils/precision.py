"""Where float64 is: on the device itself or, where that has none as Apple's GPUs, on the CPU."""

import torch
from torch import Tensor

from secateur.utils.errors import InputError


def exact_device(device: torch.device) -> torch.device:
    """Where float64 numbers of a device belong."""
    return torch.device("cpu") if device.type == "mps" else device


def exact(values: Tensor) -> Tensor:
    """The numbers in float64, where their device has it; no copy where they are so already."""
    return values.to(exact_device(values.device)).double()  # moved first: only then it can be done


def check_exact(device: torch.device, what: str) -> None:
    """Refuse a device without float64 for what is not made for one.

    Raises:
        InputError: it has none.
    """
    if exact_device(device) != device:
        raise InputError(f"--device {device}: {what} needs a CPU or a CUDA GPU. Try --device cpu.")
