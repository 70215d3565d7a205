"""Approximation of a weight by a 2:4 sparse matrix between block-diagonal factors."""

from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.linalg.masks import largest_of_groups

PAIRS = torch.tensor(list(combinations(range(4), 2)))  #: the six supports of a group
PATIENCE, ENOUGH = 100, 1e-6  #: stops where that many steps gain less than this share
PULL = 1e-9  #: towards the wrapper that there was, relative; keeps its least squares regular


class Factors(NamedTuple):
    """W̄ ≈ A S B, in blocks: A (P, b, b), S (P, b, Q, b) with its mask, B (Q, b, b)."""

    left: Tensor
    core: Tensor
    mask: Tensor
    right: Tensor

    def product(self) -> Tensor:
        inner = torch.einsum("prqc,qck->prqk", self.core, self.right)
        return torch.einsum("pir,prqk->piqk", self.left, inner)


def norms(weight: Tensor, dim: int) -> Tensor:
    """Norms of columns (0) or rows (1); 1 for zero vectors."""
    found = weight.norm(dim=dim)
    return torch.where(found > 0, found, 1.0)


def descent(
    weight: Tensor, energy: Tensor, block: int, rounds: int, seed: int
) -> Iterator[tuple[Factors, float]]:
    """States with their losses, starting from NoWag-P; the loss never increases."""
    root = energy.clamp_min(0).sqrt()
    mask = largest_of_groups((weight * root).square(), 2, 4)
    left, right = (torch.eye(block).to(weight).repeat(size // block, 1, 1) for size in weight.shape)
    shape = (len(left), block, len(right), block)
    state = Factors(left, (weight * mask).view(shape), mask.view(shape), right)
    target, root = weight.view(shape), root.view(-1, 1, block)
    generator = torch.Generator(weight.device).manual_seed(seed)
    losses = [_loss(state, target, root)]
    yield state, losses[0]
    for _ in range(rounds):
        state = slid(wrapped(state, target, root), target, root)
        state = regrouped(state, target, root, generator)
        losses.append(_loss(state, target, root))
        yield state, losses[-1]
        if len(losses) > PATIENCE and losses[-1] > (1 - ENOUGH) * losses[-1 - PATIENCE]:
            return


def _loss(state: Factors, target: Tensor, root: Tensor) -> float:
    return float(((state.product() - target) * root.squeeze(1)).square().sum())


def _solved(gram: Tensor, cross: Tensor, before: Tensor) -> Tensor:
    """Minimize ‖D X − T‖² + ρ‖X − X₀‖² over X, from DᵀD and DᵀT; never worse than X₀."""
    pull = PULL * gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-200)
    pull = pull[..., None, None] * torch.eye(gram.shape[-1]).to(gram)
    found: Tensor = torch.linalg.solve(gram + pull, cross + pull @ before)
    return found


def wrapped(state: Factors, target: Tensor, root: Tensor) -> Factors:
    """Solve for the best A, then for the best B."""
    inner = torch.einsum("prqc,qck->prqk", state.core, state.right * root).flatten(2)
    wanted = (target * root.squeeze(1)).flatten(2)
    left = _solved(inner @ inner.mT, inner @ wanted.mT, state.left.mT).mT
    # A column of B has one h for all of its errors, so h has no say in it.
    inner = torch.einsum("pir,prqc->qpic", left, state.core).flatten(1, 2)
    wanted = target.permute(2, 0, 1, 3).flatten(1, 2)
    right = _solved(inner.mT @ inner, inner.mT @ wanted, state.right)
    return state._replace(left=left, right=right)


def _slope(state: Factors, target: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """The error weighted by √h, and half the gradient with respect to all entries of S."""
    error = (state.product() - target) * root.squeeze(1)
    back = torch.einsum("pir,piqk->prqk", state.left, error)
    return error, torch.einsum("prqk,qck->prqc", back, state.right * root)


def slid(state: Factors, target: Tensor, root: Tensor) -> Factors:
    """Move S along its gradient, with the best step in every pair of blocks."""
    error, slope = _slope(state, target, root)
    slope = slope * state.mask
    moved = state._replace(core=slope, right=state.right * root).product()
    far = (moved * error).sum((1, 3), keepdim=True)
    step = far / moved.square().sum((1, 3), keepdim=True).clamp_min(1e-300)
    return state._replace(core=state.core - step * slope)


def regrouped(state: Factors, target: Tensor, root: Tensor, generator: torch.Generator) -> Factors:
    """One group of every pair of blocks with its best support and weights.

    Without the group, with a the column of A and B₄ the rows of B that it meets, both with √h,

        ℓ(s) = ‖a‖² sᵀGs + 2 gᵀs + const,   G = B₄B₄ᵀ,   g = B₄ Eᵀa

    and for a support the least is −gᵀG⁻¹g / ‖a‖², at s = −G⁻¹g / ‖a‖².
    """
    error, slope = _slope(state, target, root)
    blocks, size, others, _ = slope.shape
    weights = slope.abs().unflatten(3, (-1, 4)).sum(-1).transpose(1, 2).flatten(2)
    weights = weights / weights.amax(-1, keepdim=True).clamp_min(1e-300) + 1e-12
    drawn = torch.multinomial(weights.flatten(0, 1), 1, generator=generator)
    row, group = (part.view(blocks, others) for part in (drawn // (size // 4), drawn % (size // 4)))
    first = torch.arange(blocks, device=row.device).unsqueeze(1)
    second = torch.arange(others, device=row.device)
    at = first, row, second, group
    core, mask = (t.clone().unflatten(3, (-1, 4)) for t in (state.core, state.mask))
    column = state.left.mT[first, row]
    rows = (state.right * root).unflatten(1, (-1, 4))[second, group]
    length = column.square().sum(-1, keepdim=True).clamp_min(1e-300)
    gram, old = rows @ rows.mT, core[at]
    back = torch.einsum("pqi,piqk->pqk", column, error)

    def times(matrix: Tensor, vector: Tensor) -> Tensor:
        return (matrix @ vector.unsqueeze(-1)).squeeze(-1)

    def change(matrix: Tensor, linear: Tensor, s: Tensor, a: Tensor) -> Tensor:
        return ((a * times(matrix, s) + 2 * linear) * s).sum(-1)

    linear = times(rows, back) - length * times(gram, old)
    pairs = PAIRS.to(row.device)
    own = gram[..., pairs.unsqueeze(2), pairs.unsqueeze(1)]  # (…, 6, 2, 2)
    trace = own.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    safe = own + (1e-12 * trace + 1e-300) * torch.eye(2).to(own)
    a = length.unsqueeze(-1)
    found = -torch.linalg.solve(safe, linear[..., pairs]) / a
    losses = change(own, linear[..., pairs], found, a)
    best = losses.argmin(-1, keepdim=True)
    support = pairs[best.squeeze(-1)]
    values = found.gather(2, best.unsqueeze(-1).expand(-1, -1, 1, 2)).squeeze(2)
    better = losses.gather(2, best) < change(gram, linear, old, length).unsqueeze(-1)
    core[at] = torch.where(better, torch.zeros_like(old).scatter(-1, support, values), old)
    chosen = torch.zeros_like(mask[at]).scatter(-1, support, True)
    mask[at] = torch.where(better, chosen, mask[at])
    return state._replace(core=core.flatten(3), mask=mask.flatten(3))
