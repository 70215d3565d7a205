"""Nyström approximation of an MLP: keep channels of high ridge leverage, refit the consumer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.block import Block
from secateur.curve import Curve
from secateur.linalg import decoder, nested_errors, ridge_leverage
from secateur.methods.base import Narrowing
from secateur.statistics import BlockStatistics, Needs
from secateur.units import Unit


@dataclass(frozen=True)
class Nystrom:
    """MoDeGPT's type I module, for the hidden channels of an MLP.

    With C the Gram of the hidden channels h as the consumer reads them (for a gated MLP that is
    act(gate) ∘ up, so one index set serves both producers):

        score   s_i = [C (C + λI)⁻¹]_ii
        refit   W_down ← (C_SS)⁻¹ C_S: W_down

    Don't use it where the consumer matters to the choice: the score ignores W_down.

    Source: arXiv 2408.09632, algorithm 1.

    Attributes:
        leverage_ridge: λ of the score, relative to the mean of diag C.
        refit_ridge: ridge of the least squares, likewise relative.
    """

    leverage_ridge: float
    refit_ridge: float

    def curve(self, unit: Unit, block: Block, statistics: BlockStatistics) -> Curve:
        """Exact error of the refitted consumer for every prefix of the ranking."""
        gram = statistics[Needs.HIDDEN_GRAM].mean
        order = self._ranking(unit, gram)
        errors = nested_errors(gram, block.consumer_weight, order, self.refit_ridge, unit.name)
        return Curve.of(errors)

    def compress(
        self, unit: Unit, size: int, block: Block, statistics: BlockStatistics
    ) -> Narrowing:
        """The ``size`` channels of highest leverage, and the refit from them."""
        gram = statistics[Needs.HIDDEN_GRAM].mean
        keep = torch.sort(self._ranking(unit, gram)[:size]).values
        return Narrowing(keep=keep, decode=decoder(gram, keep, self.refit_ridge, unit.name))

    def _ranking(self, unit: Unit, gram: Tensor) -> Tensor:
        scores = ridge_leverage(gram, self.leverage_ridge, unit.name)
        return scores.argsort(descending=True, stable=True)
