"""Replacement by a constant: a block goes, and its mean change stays as a bias."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from secateur.allocate.base import Allocator
from secateur.allocate.least_error import LeastError
from secateur.calibration.needs import BlockStatistics, Need, Needs
from secateur.methods.base import Method, Solution
from secateur.models.block import Block
from secateur.structure.error_curve import Curve
from secateur.structure.narrowing import Narrowing
from secateur.structure.units import DEPTH, Unit
from secateur.utils.options import option

if TYPE_CHECKING:
    from secateur.models.model import Model


@dataclass(frozen=True)
class Replace(Method):
    """Remove whole blocks and replace each by the mean of its contribution.

    With x what a block gets and y what it gives, over all tokens,

        y → x + b,   b = E(y − x),   error (E‖y − x‖² − ‖b‖²) / E‖y‖²

    The MLP of the last block that stays before it adds b, exactly; so the first block stays. Where
    norms stand behind MLPs or sums there is no place for b; it is left out, and any block may go.
    Don't use it if stock classes without such a bias must load the result (``compensate`` 0
    leaves it out).

    Source: own; the mean of FLAP (arXiv 2312.11983), for whole blocks.
    """

    compensate: int = option(1, "1 adds the mean of what is removed to a bias, 0 does not", 0, 1)

    name: ClassVar[str] = "replace"
    summary: ClassVar[str] = "removes whole blocks; a bias replaces the mean of their contribution"
    source: ClassVar[str] = "own; arXiv 2312.11983 for blocks"
    needs: ClassVar[frozenset[Need]] = frozenset({Needs.CHANGE})
    kinds: ClassVar[tuple[str, ...]] = DEPTH

    @property
    def allocator(self) -> Allocator:
        """The least sum of errors."""
        return LeastError()

    @property
    def biased(self) -> bool:
        """A bias stands for the mean."""
        return bool(self.compensate)

    def units(self, model: "Model", multiple_of: int) -> list[Unit]:
        """All blocks; the first has one size where those behind it need it for their constants."""
        found = super().units(model, multiple_of)
        stays = self.compensate and any(block.sums for block in model.blocks)
        return [replace(u, least=1) if stays and u.block == 0 else u for u in found]

    def solve(self, unit: Unit, block: Block, statistics: BlockStatistics) -> Solution:
        """The mean, and what it leaves."""
        means = statistics[Needs.CHANGE].mean
        constant, (change, whole) = means[:-2], means[-2:].tolist()
        if not (self.compensate and block.sums):
            return Solution(Curve((change / whole, 0.0)), lambda _: Narrowing())
        error = max(0.0, change - float(constant.square().sum())) / whole
        return Solution(Curve((error, 0.0)), lambda _: Narrowing(bias=constant))
