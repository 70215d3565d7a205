"""ZipLM: channels and heads leave one by one, and the others make up for each before the next."""

from dataclasses import dataclass
from typing import ClassVar

from secateur.allocate.base import Allocator
from secateur.allocate.spdy import SPDY
from secateur.calibration.needs import BlockStatistics
from secateur.linalg.least_squares import damped
from secateur.linalg.obs import backward_elimination
from secateur.methods.base import Solution
from secateur.methods.refitted import RefittedMethod, in_order, problem
from secateur.models.block import Block
from secateur.structure.units import Unit


@dataclass(frozen=True)
class ZipLM(RefittedMethod):
    """Prune channels and KV heads one by one with the optimal brain surgeon, and refit after each.

    With H = C + λI of the coordinates that are left, M those of a channel or of all query heads of
    a KV head, and W the consumer's rows as they are by now:

        cost     ε_M = tr W_Mᵀ ([H⁻¹]_MM)⁻¹ W_M
        update   W   ← W − H⁻¹_:M ([H⁻¹]_MM)⁻¹ W_M          for the M of least cost
                 H⁻¹ ← H⁻¹ − H⁻¹_:M ([H⁻¹]_MM)⁻¹ H⁻¹_M:

    The costs add up to the error of the joint refit, so one pass gives every size. Blocks don't
    correct each other's errors. Don't use it with fewer calibration tokens than an MLP has
    channels.

    Source: Kurtic et al., "ZipLM: Inference-Aware Structured Pruning of Language Models",
    arXiv 2302.04089, section 3.1.
    """

    name: ClassVar[str] = "ziplm"
    summary: ClassVar[str] = "prunes channels and heads one by one with OBS, and refits after each"
    source: ClassVar[str] = "arXiv 2302.04089"

    @property
    def allocator(self) -> Allocator:
        """The published search."""
        return SPDY()

    def solve(self, unit: Unit, block: Block, statistics: BlockStatistics) -> Solution:
        """The last to go are the first to stay."""
        gram, weight, width = problem(unit, block, statistics)
        hessian = damped(gram, self.ridge)  # W itself is the fit to H W, so nothing pulls to zero
        order, _ = backward_elimination(hessian, hessian @ weight, 0.0, unit.name, width)
        return in_order(unit, block, statistics, order, self.ridge)
