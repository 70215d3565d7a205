"""Wanda-sp: weight times activation norm, block after block."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.allocate.base import Allocator
from secateur.allocate.uniform import Uniform
from secateur.calibration.needs import MOMENTS, BlockStatistics, Need
from secateur.methods.scored import ScoredMethod
from secateur.models.block import Block
from secateur.structure.units import Unit


@dataclass(frozen=True)
class WandaSP(ScoredMethod):
    """Prune channels and heads by Wanda's score, measured after the blocks before are pruned.

    With x what a matrix W reads and o its outputs,

        s_j = ‖x_j‖ · mean_o |W_jo|,   a KV head's is the sum over its query heads' coordinates

    The statistics of a block come from the model whose earlier blocks are already pruned. Don't use
    it below about 0.8: the remaining weights are not refitted.

    Source: An et al., "Fluctuation-based Adaptive Structured Pruning", arXiv 2312.11983, which has
    it as its baseline; Sun et al., arXiv 2306.11695, equation 1, for the score.
    """

    name: ClassVar[str] = "wanda-sp"
    summary: ClassVar[str] = "prunes channels and heads by weight times activation norm"
    source: ClassVar[str] = "arXiv 2306.11695, 2312.11983"
    needs: ClassVar[frozenset[Need]] = frozenset(MOMENTS.values())
    rereads: ClassVar[bool] = True

    @property
    def allocator(self) -> Allocator:
        """One ratio for all."""
        return Uniform()

    def scores(self, unit: Unit, block: Block, statistics: BlockStatistics) -> Tensor:
        """Norm times mean weight, summed over what goes together."""
        axis = block.axis(unit)
        rows = axis.read()  # size, coordinates of each, outputs
        mean, energy = statistics[MOMENTS[unit.kind]].mean.unbind()
        if (own := axis.constant) is not None:
            energy = energy + (2 * mean + own) * own  # of x with the value bias in it
        norms = energy.clamp_min(0.0).sqrt().view(rows.shape[:2])
        scores: Tensor = (norms * rows.abs().mean(2)).sum(1)
        return scores
