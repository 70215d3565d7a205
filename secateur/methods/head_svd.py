"""SVD of value and output: the best lower rank for each KV group, in closed form."""

from dataclasses import dataclass

import torch

from secateur.block import Block
from secateur.curve import Curve
from secateur.linalg import low_rank_in_metric
from secateur.methods.base import Narrowing
from secateur.statistics import BlockStatistics, Needs
from secateur.units import Unit


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

    def curve(self, unit: Unit, block: Block, statistics: BlockStatistics) -> Curve:
        """The discarded σ² of all KV groups, exact for the X-only objective."""
        gram = statistics[Needs.VALUE_GRAM].mean
        energies = low_rank_in_metric(gram, block.output_weight, self.ridge)[2].sum(0)
        tail = energies.flip(0).cumsum(0).flip(0)
        return Curve.of(torch.cat((tail, tail.new_zeros(1))))

    def compress(
        self, unit: Unit, size: int, block: Block, statistics: BlockStatistics
    ) -> Narrowing:
        """The leading ``size`` directions of every KV group."""
        gram = statistics[Needs.VALUE_GRAM].mean
        encode, decode, _ = low_rank_in_metric(gram, block.output_weight, self.ridge)
        return Narrowing(encode=encode[..., :size], decode=decode[:, :size])
