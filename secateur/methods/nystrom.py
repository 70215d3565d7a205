"""Nyström approximation of an MLP: keep channels of high ridge leverage, refit the consumer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.calibration.needs import BlockStatistics, Needs
from secateur.linalg.least_squares import least_squares, nested_errors, reordered, ridge_leverage
from secateur.methods.base import Solution
from secateur.models.block import Block
from secateur.structure.error_curve import Curve
from secateur.structure.narrowing import Narrowing
from secateur.structure.units import Unit


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

    def solve(self, unit: Unit, block: Block, statistics: BlockStatistics) -> Solution:
        """The channels of highest leverage, and the exact error of the refit from them."""
        gram, weight = statistics[Needs.HIDDEN_GRAM].mean, block.mlp_of(unit).consumer_weight
        scores = ridge_leverage(gram, self.leverage_ridge, unit.name)
        order = scores.argsort(descending=True, stable=True)

        def choose(size: int) -> Tensor:
            return torch.sort(order[:size]).values

        def keeping(keep: Tensor) -> Narrowing:
            given = reordered(gram, keep), gram[keep] @ weight, weight[keep]
            rows = least_squares(*given, self.refit_ridge, unit.name, spare=True)
            return Narrowing(keep=keep, consumer=rows)

        def curve() -> Curve:
            return Curve.of(nested_errors(gram, weight, order, self.refit_ridge, unit.name))

        return Solution.of(curve, choose, keeping)
