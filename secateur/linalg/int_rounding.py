"""Rounding of weights to integers of few bits times a scale."""

import torch
from torch import Tensor


def codes_of(weights: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Round to integers from −2^(bits−1) to 2^(bits−1) − 1, for scales that broadcast."""
    most = 2 ** (bits - 1)
    return (weights / scale.double()).round().clamp(-most, most - 1).to(torch.int8)


def best_scale(
    groups: Tensor, bits: int, steps: int, stored: torch.dtype, worth: Tensor | None = None
) -> Tensor:
    """The scale of each group (…, weights), in its ``stored`` format, with the smallest squared
    error.

    The candidates are max|w| / (2^(bits−1) − 1), which clips nothing, and ``steps`` scales down to
    half of it. ``worth`` weights the squared errors. A scale of zero becomes 1.
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
