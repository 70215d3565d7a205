"""Backward elimination of MLP channels on the joint least squares objective."""

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.calibration.needs import BlockStatistics, Needs
from secateur.linalg.least_squares import least_squares
from secateur.linalg.obs import backward_elimination, survivors
from secateur.methods.base import Solution
from secateur.models.block import Block
from secateur.structure.error_curve import Curve
from secateur.structure.narrowing import Narrowing
from secateur.structure.units import Unit


@dataclass(frozen=True)
class JointOBS:
    """Optimal brain surgeon over the hidden channels of an MLP, one channel at a time.

    With C the Gram of the hidden channels h as the consumer reads them and t what its output should
    be (its own output, or more behind blocks that are already narrowed):

        error   E(S) = min_Ŵ E‖t − h_S Ŵ‖²
        removed j = argmin ‖Ŵ_j‖² / [(C + λI)⁻¹]_jj, then the others are refitted, and so on

    One pass gives the order and the error at every size. Unlike a leverage it looks at what the
    consumer does with a channel. Greedy, so not always the best set: on small examples it is.

    Source: ZipLM, arXiv 2302.04089, section 3.1; Hassibi and Stork's optimal brain surgeon.

    Attributes:
        ridge: λ, relative to the mean of diag C; it pulls the refit to the dense rows.
    """

    ridge: float

    def solve(self, unit: Unit, block: Block, statistics: BlockStatistics) -> Solution:
        """The channels that a joint fit can spare least, and that fit."""
        gram, weight = statistics[Needs.HIDDEN_GRAM].mean, block.mlp_of(unit).consumer_weight
        target = statistics.get(Needs.HIDDEN_TARGET)
        cross = gram @ weight if target is None else target.mean
        given = gram, cross, self.ridge
        order: Tensor | None = None

        def curve() -> Curve:
            nonlocal order
            order, errors = backward_elimination(*given, unit.name)
            return Curve.of(errors)

        def choose(size: int) -> Tensor:
            if order is None:  # nobody has asked for the smaller sizes
                return survivors(*given, size, unit.name)
            return torch.sort(order[:size]).values

        def keeping(keep: Tensor) -> Narrowing:
            kept = gram[keep][:, keep]
            rows = least_squares(kept, cross[keep], weight[keep], self.ridge, unit.name)
            return Narrowing(keep=keep, consumer=rows)

        return Solution.of(curve, choose, keeping)
