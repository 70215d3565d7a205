"""FLAP: channels whose activation varies least are replaced by its mean."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.allocate.base import Allocator
from secateur.allocate.fluctuation import Fluctuation, fluctuations
from secateur.calibration.needs import MOMENTS, BlockStatistics, Need
from secateur.methods.scored import ScoredMethod
from secateur.models.block import Block
from secateur.structure.units import MLP, Unit
from secateur.utils.options import option


@dataclass(frozen=True)
class FLAP(ScoredMethod):
    """Prune channels and heads with the smallest fluctuation, and replace them by their mean.

    With x_j a coordinate that W reads, over all tokens,

        wifv_j = Var(x_j) · ‖W_j‖²        the expected squared error of x_j → E x_j
        b     += Σ_gone E x_j · W_j

    Channels go by wifv, KV heads by the sum of wifv² over their query heads' coordinates, as the
    published code has it. Don't use it below about 0.7, or if the runtime does not support these
    biases (``compensate`` 0 leaves them out).

    Source: An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models",
    arXiv 2312.11983, equations 5 to 8.
    """

    compensate: int = option(1, "1 adds the mean of what is removed to a bias, 0 does not", 0, 1)

    name: ClassVar[str] = "flap"
    summary: ClassVar[str] = "prunes channels and heads that vary least; a bias replaces their mean"
    source: ClassVar[str] = "arXiv 2312.11983"
    curve: ClassVar[str] = "fluctuation: share of the unit's squared error about the mean that goes"
    needs: ClassVar[frozenset[Need]] = frozenset(MOMENTS.values())

    @property
    def allocator(self) -> Allocator:
        """One threshold for all standardised scores."""
        return Fluctuation()

    @property
    def biased(self) -> bool:
        """A bias stands for the mean."""
        return bool(self.compensate)

    def scores(self, unit: Unit, block: Block, statistics: BlockStatistics) -> Tensor:
        """What to rank by."""
        found = fluctuations(block.axis(unit), statistics)
        return found.squeeze(1) if isinstance(unit, MLP) else found.square().sum(1)

    def errors(self, unit: Unit, block: Block, statistics: BlockStatistics) -> Tensor:
        """The expected squared error."""
        return fluctuations(block.axis(unit), statistics).sum(1)

    def bias(
        self, unit: Unit, block: Block, statistics: BlockStatistics, gone: Tensor
    ) -> Tensor | None:
        """What the mean of all that is gone would have added."""
        if not self.compensate:
            return None
        axis, mean = block.axis(unit), statistics[MOMENTS[unit.kind]].mean[0]
        rows = axis.read()
        if (own := axis.constant) is not None:
            mean = mean + own
        means = mean.view(rows.shape[:2])
        constant: Tensor = means[gone].flatten() @ rows[gone].flatten(0, 1)
        return constant
