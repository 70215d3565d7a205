"""Rotary pairs of queries and keys, chosen and rescaled by what they add to the output."""

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.block import Block
from secateur.curve import Curve
from secateur.linalg import damped_cholesky, least_squares
from secateur.methods.base import Narrowing, Solution
from secateur.methods.cr import per_coordinate
from secateur.statistics import BlockStatistics, Needs
from secateur.units import Unit


@dataclass(frozen=True)
class ExactPairs:
    """The query/key width, by elimination on the exact quadratic error of the attention output.

    The scores are a sum over pairs, so to first order the output's error is a quadratic form
    (t − c)ᵀ M (t − c) in the coefficients c of the pairs, with M the
    :class:`~secateur.statistics.PairScores` and t those of the dense model. A kept pair may be
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
        turning = block.heads.rotary // 2
        heads = [self._head(form, turning) for form in forms]

        def at(size: int) -> Narrowing:
            found = [
                self._encoded(form, *h[:2], size // 2) for form, h in zip(forms, heads, strict=True)
            ]
            return Narrowing(
                keep=torch.stack([keep for keep, _ in found]),
                encode=torch.stack([encode for _, encode in found]),
            )

        errors = torch.stack([losses for _, _, losses in heads]).sum(0)
        return Solution(Curve.of(per_coordinate(errors)), at)

    def _head(self, form: Tensor, turning: int) -> tuple[Tensor, Tensor, Tensor]:
        """Features of the pairs (pairs, 2), best pair first; t; losses at 0 … all pairs."""
        half = len(form) // 2
        first = torch.arange(half, device=form.device)
        pairs = torch.stack((first, first + half), 1)
        still = pairs[turning:].flatten()
        still = still[form.diagonal()[still].argsort(descending=True)]  # free to pair up
        pairs = torch.cat((pairs[:turning], still.view(-1, 2)))
        target = torch.ones(2 * half, dtype=form.dtype, device=form.device)
        target[half : half + turning] = 0
        factor, _ = damped_cholesky(form, self.ridge, "pairs of queries and keys")
        inverse = torch.cholesky_inverse(factor)
        gains, alive = target.clone(), torch.ones(half, dtype=torch.bool, device=form.device)
        removed, losses = [], [form.new_zeros(())]
        for _ in range(half):
            own = inverse[pairs.unsqueeze(2), pairs.unsqueeze(1)]  # pairs, 2, 2
            own[~alive] = torch.eye(2, dtype=form.dtype, device=form.device)
            step = torch.linalg.solve(own, gains[pairs])
            loss = (gains[pairs] * step).sum(1).masked_fill(~alive, torch.inf)
            worst = int(loss.argmin())
            pair = pairs[worst]
            losses.append(losses[-1] + loss[worst])
            removed.append(worst)
            alive[worst] = False
            gains = gains - inverse[:, pair] @ step[worst]
            inverse = inverse - inverse[:, pair] @ torch.linalg.solve(own[worst], inverse[pair])
        return pairs[removed[::-1]], target, torch.stack(losses[::-1])

    def _encoded(
        self, form: Tensor, pairs: Tensor, target: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """The kept coordinates of one head and the map of its queries (width, 2 · count)."""
        kept = pairs[:count]
        kept = kept[kept[:, 0].argsort()]  # in the order of the rotary tables
        features, half = kept.t().flatten(), len(form) // 2
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
        return features, encode
