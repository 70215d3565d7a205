"""Value and output at a lower rank, judged where the output projection reads them."""

from dataclasses import dataclass

import torch

from secateur.calibration.needs import BlockStatistics, Needs
from secateur.linalg.least_squares import least_squares, low_rank_in_metric, tails
from secateur.methods.base import Solution
from secateur.models.block import Block
from secateur.structure.error_curve import Curve
from secateur.structure.narrowing import Narrowing
from secateur.structure.units import Unit


@dataclass(frozen=True)
class MixedSVD:
    """The rank of a head's value/output map, from the values as attention mixes them.

    With z the output projection's input, C = E zᵀz over all heads, C_h its diagonal block of head
    h, and W_O of the query heads that read a KV head j side by side:

        G_j = Σ_{h reads j} C_h,   G_j^½ W_O = U Σ Vᵀ,   W_V ← W_V E,  E = G_j^-½ U_k
        W_O ← (Eᵀ C E)⁻¹ Eᵀ E[zᵀ t],   t the output's target

    The basis is best for a KV group whose heads mix alike; where they differ, it takes their Grams
    together and leaves out what they share, and so does the curve. The refit is joint over all
    heads, so that one head makes good what another lost. Don't use it where every head must keep a
    projection of its own that the others know nothing of.

    Source: own; MoDeGPT's algorithm 3 (arXiv 2408.09632) with the Gram behind the attention.

    Attributes:
        ridge: relative to the mean of a Gram's diagonal.
    """

    ridge: float

    def solve(self, unit: Unit, block: Block, statistics: BlockStatistics) -> Solution:
        """The leading directions of every KV group, and the joint refit from them."""
        attention = block.attention_of(unit)
        gram, rows = statistics[Needs.MIXED_GRAM].mean, attention.output_rows
        target = statistics.get(Needs.MIXED_TARGET)
        cross = gram @ rows.flatten(0, 1) if target is None else target.mean
        heads, width, _ = rows.shape
        group = attention.module.num_key_value_groups
        own = gram.unflatten(0, (heads, width)).unflatten(2, (heads, width))
        own = own.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # heads, width, width
        metric = own.unflatten(0, (-1, group)).sum(1)
        encode, decode, energies = low_rank_in_metric(metric, attention.output_weight, self.ridge)

        def at(size: int) -> Narrowing:
            if size == width:
                prior = rows.flatten(0, 1)
                return Narrowing(consumer=least_squares(gram, cross, prior, self.ridge, unit.name))
            basis = torch.block_diag(*encode[..., :size].repeat_interleave(group, 0))
            prior = decode[:, :size].repeat_interleave(group, 0) @ rows
            consumer = least_squares(
                basis.t() @ gram @ basis,
                basis.t() @ cross,
                prior.flatten(0, 1),
                self.ridge,
                unit.name,
            )
            return Narrowing(encode=encode[..., :size], consumer=consumer)

        return Solution(Curve.of(tails(energies.sum(0))), at)
