"""CR decomposition of query and key: keep the coordinate pairs that carry the scores."""

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.calibration.needs import BlockStatistics, Needs
from secateur.linalg.least_squares import tails
from secateur.methods.base import Solution
from secateur.models.attention import Attention
from secateur.models.block import Block
from secateur.structure.error_curve import Curve
from secateur.structure.narrowing import Narrowing
from secateur.structure.units import Unit
from secateur.utils.errors import InputError


@dataclass(frozen=True)
class CR:
    """MoDeGPT's type II module, for the width of queries and keys.

    The published score ‖C_q^½ e_i‖ ‖C_k^½ e_i‖ is √(E q_i² · E k_i²), so only energies are needed.
    Two coordinates that rotate together are one pair, whose energy no rotation changes; the query
    heads that read one KV head share its kept set:

        score of pair p in KV head j   s_jp² = E k_jp² · Σ_{heads h of j} E q_hp²

    The softmax scale stays that of the dense model. Don't use it where queries are normalised
    inside the head: a norm over fewer dims is another norm.

    Source: arXiv 2408.09632, algorithm 2; grouped heads and rotary pairs as in its appendix.
    """

    def solve(self, unit: Unit, block: Block, statistics: BlockStatistics) -> Solution:
        """The best pairs of every KV head, first halves before second halves.

        The curve is the removed share of Σ s², which bounds the scores' error if pairs were
        uncorrelated.
        """
        attention = block.attention_of(unit)
        scores, pairs = self._ranked(attention, statistics)

        def choose(size: int) -> Tensor:
            kept = pairs[:, : size // 2]
            if attention.layout.rotary:  # in the tables' order; else any order is as good
                kept = kept.gather(1, kept[..., 0].argsort(dim=1).unsqueeze(-1).expand_as(kept))
            return kept.mT.flatten(1)

        def keeping(keep: Tensor) -> Narrowing:
            check_pairs(keep, pairs.shape[1], attention.layout.rotary // 2)
            return Narrowing(keep=keep)

        curve = Curve.of(per_coordinate(tails(scores.sum(0))))  # best pairs first
        return Solution.of(curve, choose, keeping)

    def _ranked(self, attention: Attention, statistics: BlockStatistics) -> tuple[Tensor, Tensor]:
        """Squared scores (kv heads, pairs), descending, and the pairs' coordinates (…, 2)."""
        key = statistics[Needs.KEY_ENERGY].mean
        query = statistics[Needs.QUERY_ENERGY].mean.view(len(key), -1, key.shape[1]).sum(1)
        half = key.shape[1] // 2
        turning = attention.layout.rotary // 2
        coordinates = torch.arange(half, device=key.device).expand(len(key), -1)
        pairs = torch.stack((coordinates, coordinates + half), -1)
        # Half of the product of energies is what a turning pair adds on average over all angles.
        scores = (key[:, :half] + key[:, half:]) * (query[:, :half] + query[:, half:]) / 2
        if turning < half:
            # Coordinates that do not turn are free to pair up: the best with the second best.
            still = torch.cat((coordinates[:, turning:], coordinates[:, turning:] + half), 1)
            single = (key * query).gather(1, still)
            order = single.argsort(dim=1, descending=True, stable=True)
            still, single = still.gather(1, order), single.gather(1, order)
            pairs = torch.cat((pairs[:, :turning], still.unflatten(1, (-1, 2))), 1)
            scores = torch.cat((scores[:, :turning], single.unflatten(1, (-1, 2)).sum(-1)), 1)
        order = scores.argsort(dim=1, descending=True, stable=True)
        return scores.gather(1, order), pairs.gather(1, order.unsqueeze(-1).expand_as(pairs))


def check_pairs(keep: Tensor, half: int, turning: int) -> None:
    """Refuse coordinates of queries and keys, (kv heads, k), that are no pairs.

    The first ``turning`` pairs rotate: coordinate p with coordinate p + ``half``.

    Raises:
        InputError: a coordinate that rotates is kept without its partner, or out of order.
    """
    count = keep.shape[1] // 2
    first, second = keep[:, :count], keep[:, count:]
    fits = first.shape == second.shape
    if fits and turning:
        turns = (first % half < turning) | (second % half < turning)
        fits = bool((~turns | ((first < half) & (second == first + half))).all())
        fits = fits and bool((first.diff(dim=1) > 0).all())
    if not fits:
        raise InputError(
            f"coordinates that rotate together, p and p + {half}, stay or "
            f"go together, first halves in ascending order before second halves."
        )


def per_coordinate(errors: Tensor) -> Tensor:
    """Errors at 0 … n / 2 pairs as errors at 0 … n coordinates, of which an odd one is wasted."""
    return torch.cat((errors[:-1].repeat_interleave(2), errors[-1:]))
