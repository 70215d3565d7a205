"""Weights as whole numbers of few bits times a scale."""

import torch
from torch import Tensor


def codes_of(weights: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The nearest whole numbers, from −2^(bits−1) to 2^(bits−1) − 1, for scales that broadcast."""
    most = 2 ** (bits - 1)
    return (weights / scale.double()).round().clamp(-most, most - 1).to(torch.int8)


def best_scale(
    groups: Tensor, bits: int, steps: int, stored: torch.dtype, worth: Tensor | None = None
) -> Tensor:
    """The scale of each group (…, weights), in its ``stored`` format, with the least squared error.

    Tried are max|w| / (2^(bits−1) − 1), with which nothing is clipped, and so many ``steps`` down
    towards half of that. Squares may be of unequal ``worth``. Where a scale would be zero it is 1.
    """
    widest = groups.abs().amax(-1) / (2 ** (bits - 1) - 1)
    best, least = torch.empty_like(widest, dtype=stored), torch.full_like(widest, torch.inf)
    for step in range(steps):
        tried = (widest * (1 - step / (2 * steps))).to(stored)
        tried = torch.where(tried > 0, tried, 1.0)
        multiples = codes_of(groups, tried.unsqueeze(-1), bits) * tried.double().unsqueeze(-1)
        squares = (groups - multiples).square()
        error = (squares if worth is None else squares * worth).sum(-1)
        better = error < least
        best, least = torch.where(better, tried, best), torch.where(better, error, least)
    return best
