"""Methods that give every channel and every KV head one number and remove the smallest."""

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from secateur.calibration.needs import BlockStatistics
from secateur.linalg.least_squares import tails
from secateur.methods.base import Method, Solution
from secateur.models.block import Block
from secateur.structure.error_curve import Curve
from secateur.structure.narrowing import Narrowing
from secateur.structure.units import WHOLE_HEADS, Unit


class ScoredMethod(Method):
    """Prunes MLP channels and whole KV heads by a score, and refits at most a bias.

    This is cheap, and what most structured pruning does. Don't use such a method if a few percent
    of perplexity matter: the remaining weights are not refitted.
    """

    curve: ClassVar[str] = "lost score: share of the unit's summed scores that goes"
    kinds: ClassVar[tuple[str, ...]] = WHOLE_HEADS

    @abstractmethod
    def scores(self, unit: Unit, block: Block, statistics: BlockStatistics) -> Tensor:
        """What every channel or KV head is worth, (size)."""

    def errors(self, unit: Unit, block: Block, statistics: BlockStatistics) -> Tensor:
        """What removing it adds to the curve, (size), at least 0; here the score."""
        return self.scores(unit, block, statistics)

    def bias(
        self, unit: Unit, block: Block, statistics: BlockStatistics, gone: Tensor
    ) -> Tensor | None:
        """A constant that makes up for channels or heads ``gone``, (outputs); here none."""
        return None

    def solve(self, unit: Unit, block: Block, statistics: BlockStatistics) -> Solution:
        """The best scores stay."""
        scores = self.scores(unit, block, statistics).double()
        order = torch.sort(scores, descending=True, stable=True).indices
        lost = self.errors(unit, block, statistics).double()[order]

        def at(size: int) -> Narrowing:
            keep, gone = torch.sort(order[:size]).values, torch.sort(order[size:]).values
            return Narrowing(keep=keep, bias=self.bias(unit, block, statistics, gone))

        return Solution(Curve.of(tails(lost)), at)
