"""SVD of value and output: the best lower rank for each KV group, in closed form."""

from dataclasses import dataclass

import torch

from secateur.calibration.needs import BlockStatistics, Needs
from secateur.linalg.least_squares import low_rank_in_metric, tails
from secateur.methods.base import Solution
from secateur.models.block import Block
from secateur.structure.error_curve import Curve
from secateur.structure.narrowing import Narrowing
from secateur.structure.units import Unit


@dataclass(frozen=True)
class HeadSVD:
    """MoDeGPT's type III module, for the rank of a head's value/output map.

    The published two singular value decompositions of C^½ W_V and of the hidden × hidden map equal
    one of head size. With the head Gram G = W_Vᵀ C W_V and W_O the outputs of all query heads that
    read the KV head, side by side:

        G^½ W_O = U Σ Vᵀ,   W_V ← W_V G^-½ U_k,   W_O ← U_kᵀ G^½ W_O,   error = Σ_{i>k} σ_i²

    The Gram is of values before attention mixes them, as published; where attention is peaked the
    mixed values would be the better metric. A value bias is folded into the output bias first.

    Source: arXiv 2408.09632, algorithm 3.

    Attributes:
        ridge: added to G, relative to the mean of its diagonal.
    """

    ridge: float

    def solve(self, unit: Unit, block: Block, statistics: BlockStatistics) -> Solution:
        """The leading directions of every KV group, and the discarded σ² of all of them."""
        gram, attention = statistics[Needs.VALUE_GRAM].mean, block.attention_of(unit)
        encode, decode, energies = low_rank_in_metric(gram, attention.output_weight, self.ridge)
        outputs = attention.output_rows.unflatten(
            0, (len(gram), -1)
        )  # kv heads, group, value, hidden

        def at(size: int) -> Narrowing:
            rows = torch.einsum("jkn,jgno->jgko", decode[:, :size], outputs)
            return Narrowing(encode=encode[..., :size], consumer=rows.flatten(0, 2))

        return Solution(Curve.of(tails(energies.sum(0))), at)
