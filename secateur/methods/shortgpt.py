"""ShortGPT: whole blocks go, those first that turn their input least."""

from dataclasses import dataclass
from typing import ClassVar

from secateur.allocate.base import Allocator
from secateur.allocate.least_error import LeastError
from secateur.calibration.needs import BlockStatistics, Need, Needs
from secateur.methods.base import Method, Solution
from secateur.models.block import Block
from secateur.structure.error_curve import Curve
from secateur.structure.narrowing import Narrowing
from secateur.structure.units import DEPTH, Unit


@dataclass(frozen=True)
class ShortGPT(Method):
    """Remove the blocks with the smallest influence, measured once on the dense model.

    With x what a block gets and y what it gives, over all tokens,

        influence = 1 − E cos(x, y)

    The block with the smallest influence is removed first, without a refit. Every kernel keeps its
    shape, so time falls as much as parameters do. Don't use it to remove more than about a tenth:
    blocks are scored one by one, and generation breaks down earlier than with pruned widths.

    Source: Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You
    Expect", arXiv 2403.03853, equation 1.
    """

    name: ClassVar[str] = "shortgpt"
    summary: ClassVar[str] = "removes the blocks with the smallest influence"
    source: ClassVar[str] = "arXiv 2403.03853"
    curve: ClassVar[str] = "influence: 1 − cosine of what a block that goes gets and gives"
    needs: ClassVar[frozenset[Need]] = frozenset({Needs.INFLUENCE})
    kinds: ClassVar[tuple[str, ...]] = DEPTH

    @property
    def allocator(self) -> Allocator:
        """The least sum of influences."""
        return LeastError()

    def solve(self, unit: Unit, block: Block, statistics: BlockStatistics) -> Solution:
        """The influence where the block is gone."""
        influence = max(0.0, float(statistics[Needs.INFLUENCE].mean))
        return Solution(Curve((influence, 0.0)), lambda _: Narrowing())
