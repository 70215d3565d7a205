"""Sums of symmetric products, worked out on and above the diagonal alone: half of the operations.

A matrix is gone through in bands of rows. What is below the diagonal is right only inside a band,
until :func:`mirrored` copies it from above.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

BAND = 512  # rows
HALF = (torch.float16, torch.bfloat16)


def bands(matrix: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Views of its bands from the diagonal on, and the row that each begins with."""
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
    """A matrix product at least in float32; of half precision on a GPU by its tensor cores."""
    if left.dtype not in HALF:
        return left @ right
    if left.is_cuda and torch.version.cuda is not None:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def kept(matrix: Tensor, stays: Tensor) -> Tensor:
    """The rows and columns ``stays``, ascending, moved to the front in place: a view of them."""
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
