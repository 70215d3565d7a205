"""Sums of symmetric products, computed on and above the diagonal only.

A matrix is processed in bands of rows. Entries below the diagonal are valid only inside a band,
until :func:`mirrored` copies them from above.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

BAND = 512  # rows
HALF = (torch.float16, torch.bfloat16)


def bands(matrix: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Views of the bands, from the diagonal on, with the first row of each."""
    for start in range(0, max(1, len(matrix)), BAND):
        yield start, matrix[start : start + BAND, start:]


def add_product(total: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """Add scale · leftᵀ right, which has to be symmetric, to ``total`` in place, in its dtype.

    Products of half precision, which are exact in float32, are summed in float32. ``total`` may be
    on another device.
    """
    for start, band in bands(total):
        own, others = left[:, start : start + BAND].t(), right[:, start:]
        if own.dtype == total.dtype:
            band.addmm_(own, others, alpha=scale)
        else:
            band.add_(product(own, others).to(band.device), alpha=scale)
    return total


def product(left: Tensor, right: Tensor) -> Tensor:
    """A matrix product in at least float32; in half precision on a GPU with tensor cores."""
    if left.dtype not in HALF:
        return left @ right
    if left.is_cuda and torch.version.cuda is not None:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def kept(matrix: Tensor, stays: Tensor) -> Tensor:
    """Move the rows and columns ``stays`` (ascending) to the front in place, and return a view
    of them.
    """
    size = len(stays)
    for start in range(0, size, BAND):  # what is written lies before what is still to be read
        own, first = stays[start : start + BAND], int(stays[start])
        rows = matrix[own, first:]
        matrix[start : start + len(own), start:size] = rows[:, stays[start:] - first]
    return matrix[:size, :size]


def mirrored(matrix: Tensor) -> Tensor:
    """Copy what is above the diagonal below it, in place."""
    for start in range(0, len(matrix), BAND):
        end = start + BAND
        matrix[end:, start:end] = matrix[start:end, end:].t()
        own = matrix[start:end, start:end]
        own.copy_(own.triu() + own.triu(1).t())
    return matrix
