"""Weights as a₁ t₁ + a₂ t₂ with ternary t ∈ {−1, 0, 1}."""

import torch
from torch import Tensor

#: Of equally good pairs the first is taken. Between two equal scales this order makes the planes
#: differ, and for −w it gives the opposite planes.
PAIRS = ((0, 0), (1, 0), (-1, 0), (1, 1), (-1, -1), (0, 1), (0, -1), (1, -1), (-1, 1))
CONDITION = 1e12
Found = tuple[Tensor, Tensor, Tensor]  #: scales, trits and squared errors


def best_scales(groups: Tensor, trits: Tensor, ridge: float) -> Tensor:
    """The scales (2, groups) that solve (SᵀS + λI) a = Sᵀw, S = [t₁ t₂], in each group.

    λ = ``ridge`` where ‖A‖ ‖A⁻¹‖ of A = SᵀS + λI is at most 10¹², and larger elsewhere, up to 1.
    """
    first, second = trits
    a, d, b = first.square().sum(1), second.square().sum(1), (first * second).sum(1)
    x, y = (first * groups).sum(1), (second * groups).sum(1)
    plain = a * d - b * b  # a whole number, exactly
    condition = (a.square() + 2 * b.square() + d.square()) / (plain + ridge * (a + d + ridge))
    used = (ridge * (condition / CONDITION).clamp_min(1).sqrt()).clamp_max(1)
    scales = torch.stack((d * x - b * y + used * x, a * y - b * x + used * y))
    scales /= plain + used * (a + d + used)
    return scales


def errors(groups: Tensor, scales: Tensor, trits: Tensor) -> Tensor:
    """‖w − ŵ‖² of each group."""
    return (groups - (scales.unsqueeze(-1) * trits).sum(0)).square().sum(1)


def better_of(one: Found, other: Found) -> Found:
    """The better of two solutions, for each group."""
    wins = other[2] < one[2]
    scales, error = torch.where(wins, other[0], one[0]), torch.where(wins, other[2], one[2])
    return scales, torch.where(wins.unsqueeze(1), other[1], one[1]), error


def nearest_trits(groups: Tensor, scales: Tensor) -> Tensor:
    """The best of the nine ternary pairs for each weight, (2, groups, weights)."""
    first, second = scales.unsqueeze(-1)
    least, chosen = torch.full_like(groups, torch.inf), groups.new_zeros(groups.shape).long()
    for index, (t, u) in enumerate(PAIRS):
        error = (groups - (t * first + u * second)).square()
        better = error < least
        least, chosen = torch.where(better, error, least), torch.where(better, index, chosen)
    trits: Tensor = torch.tensor(PAIRS).to(groups)[chosen].movedim(-1, 0)
    return trits
