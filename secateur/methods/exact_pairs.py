"""Rotary pairs of queries and keys, chosen and rescaled by what they add to the output."""

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.calibration.needs import BlockStatistics, Needs
from secateur.linalg.least_squares import damped_cholesky, least_squares
from secateur.methods.base import Solution
from secateur.methods.cr import check_pairs, per_coordinate
from secateur.models.block import Block
from secateur.structure.error_curve import Curve
from secateur.structure.narrowing import Narrowing
from secateur.structure.units import Unit


@dataclass(frozen=True)
class ExactPairs:
    """The query/key width, by elimination on the exact quadratic error of the attention output.

    The scores are a sum over pairs, so to first order the output's error is a quadratic form
    (t − c)ᵀ M (t − c) in the coefficients c of the pairs, with M the
    ``PairScores`` and t those of the dense model. A kept pair may be
    rescaled and turned by a constant angle, which commutes with its rotation and goes into the
    query projection,

        q_p ← a_p q_p + b_p J q_p,   (a, b) = argmin (t − c)ᵀ M (t − c) with c = 0 outside S

    and the pair removed next is the one whose loss, after that refit, is least. CR keeps only the
    diagonal of a form over raw scores, and no refit. Don't use it where queries are normalised
    inside the head: a norm over fewer dims is another norm.

    Source: own; the selection without gains is the exact objective of CR, arXiv 2408.09632.

    Attributes:
        ridge: of the gains, relative to the mean of diag M; it pulls them to 1.
    """

    ridge: float

    def solve(self, unit: Unit, block: Block, statistics: BlockStatistics) -> Solution:
        """The best pairs of every KV head with their gains, first halves before second halves."""
        forms = statistics[Needs.PAIR_SCORES].mean
        turning = block.attention_of(unit).layout.rotary // 2
        heads, target, losses = self._heads(forms, turning)

        def choose(size: int) -> Tensor:
            kept = heads[:, : size // 2]
            order = kept[..., 0].argsort(dim=1)  # as the rotary tables have them
            return kept.gather(1, order.unsqueeze(-1).expand_as(kept)).mT.flatten(1)

        def keeping(keep: Tensor) -> Narrowing:
            check_pairs(keep, forms.shape[1] // 2, turning)
            pairs = keep.unflatten(1, (2, -1)).mT
            own = zip(forms, pairs, strict=True)
            encode = [self._encoded(form, kept, target) for form, kept in own]
            return Narrowing(keep=keep, encode=torch.stack(encode))

        return Solution.of(Curve.of(per_coordinate(losses.sum(0))), choose, keeping)

    def _heads(self, forms: Tensor, turning: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of all KV heads at once, best pair first: features of the pairs, (heads, pairs, 2).

        And t, one for all; and losses at 0 … all pairs, (heads, pairs + 1).
        """
        count, half = len(forms), forms.shape[1] // 2
        heads = torch.arange(count, device=forms.device)
        pairs = _pairs(forms.diagonal(dim1=1, dim2=2), turning)
        target = torch.ones(2 * half, dtype=forms.dtype, device=forms.device)
        target[half : half + turning] = 0
        what = "pairs of queries and keys"
        factors = [damped_cholesky(form, self.ridge, what)[0] for form in forms]
        inverse = torch.cholesky_inverse(torch.stack(factors))
        gains = target.expand(count, -1)
        alive = torch.ones(count, half, dtype=torch.bool, device=forms.device)
        eye = torch.eye(2, dtype=forms.dtype, device=forms.device)
        removed, losses = [], [forms.new_zeros(count)]
        at = heads[:, None, None, None], pairs.unsqueeze(3), pairs.unsqueeze(2)
        for _ in range(half):
            own = torch.where(alive[..., None, None], inverse[at], eye)  # heads, pairs, 2, 2
            given = gains.gather(1, pairs.flatten(1)).view_as(pairs)
            step = torch.linalg.solve(own, given)
            loss = (given * step).sum(2).masked_fill(~alive, torch.inf)
            worst = loss.argmin(1)
            losses.append(losses[-1] + loss[heads, worst])
            removed.append(worst)
            alive[heads, worst] = False
            columns = inverse.gather(2, pairs[heads, worst].unsqueeze(1).expand(-1, 2 * half, -1))
            gains = gains - (columns @ step[heads, worst].unsqueeze(2)).squeeze(2)
            inverse = inverse - columns @ torch.linalg.solve(own[heads, worst], columns.mT)
        order = torch.stack(removed[::-1], 1).unsqueeze(2)
        return pairs.gather(1, order.expand_as(pairs)), target, torch.stack(losses[::-1], 1)

    def _encoded(self, form: Tensor, kept: Tensor, target: Tensor) -> Tensor:
        """The map of a head's queries (width, 2 · count) to its kept pairs, (count, 2)."""
        features, half, count = kept.t().flatten(), len(form) // 2, len(kept)
        own = form[features][:, features]
        gains = least_squares(
            own, (form[features] @ target)[:, None], target[features][:, None], self.ridge, "gains"
        ).flatten()
        encode = form.new_zeros(2 * half, 2 * count)
        columns = torch.arange(2 * count, device=form.device)
        turns = target[kept[:, 1]] == 0
        real = torch.cat((gains[:count], torch.where(turns, gains[:count], gains[count:])))
        encode[features, columns] = real
        angle = torch.where(turns, gains[count:], 0)
        encode[kept[:, 1], columns[:count]] -= angle
        encode[kept[:, 0], columns[count:]] += angle
        return encode


def _pairs(energies: Tensor, turning: int) -> Tensor:
    """Which features are a pair, (heads, pairs, 2), from their energies, (heads, 2 · pairs).

    The first ``turning`` pairs rotate. Features of the others are free to pair up: the best with
    the second best.
    """
    count, half = len(energies), energies.shape[1] // 2
    first = torch.arange(half, device=energies.device)
    pairs = torch.stack((first, first + half), 1).expand(count, -1, -1)
    still = pairs[:, turning:].flatten(1)
    order = energies.gather(1, still).argsort(dim=1, descending=True)
    return torch.cat((pairs[:, :turning], still.gather(1, order).unflatten(1, (-1, 2))), 1)
