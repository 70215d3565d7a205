"""Masks of the largest scores, per row and per group of neighbours (N:M)."""

import torch
from torch import Tensor


def largest(scores: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` largest values of each row; among equal values the first."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def largest_of_groups(scores: Tensor, n: int, m: int) -> Tensor:
    """Mask of the ``n`` largest of every ``m`` neighbouring values in a row."""
    return largest(scores.unflatten(1, (-1, m)), n).flatten(1)
