"""Magnitude pruning: the smallest weights become zero."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.allocate.base import Allocator
from secateur.allocate.least_error import LeastError
from secateur.calibration.needs import BlockStatistics
from secateur.linalg.masks import largest, largest_of_groups
from secateur.methods.base import Solution
from secateur.methods.form import Metric
from secateur.methods.sparse import SparseMethod
from secateur.models.block import Block
from secateur.models.linear_ops import inputs_by_outputs
from secateur.structure.error_curve import Curve
from secateur.structure.form import Form
from secateur.structure.units import Matrix, Unit


@dataclass(frozen=True)
class Magnitude(SparseMethod):
    """Set the smallest weights of each matrix to zero.

        Ŵ_ij = W_ij where |W_ij| is among the largest of its matrix, or of its group; 0 elsewhere

    The curve is Σ (W − Ŵ)², not a share of the matrix's own, so the sum that ``least-error``
    minimises over the model is least where one threshold would leave it, in steps of ``grain``,
    but for ``floor``: a bare threshold empties matrices of small weights. Don't use it if you have
    calibration data: ``wanda`` and ``sparsegpt`` take the inputs of layers into account.

    Source: Jaiswal et al., "The Emergence of Essential Sparsity in Large Pre-trained Models",
    arXiv 2306.03805.
    """

    name: ClassVar[str] = "magnitude"
    summary: ClassVar[str] = "sets the smallest weights to zero"
    source: ClassVar[str] = "arXiv 2306.03805"
    curve: ClassVar[str] = "squares lost: sum over the zeroed weights, by the square of the width"
    data_aware: ClassVar[bool] = False

    @property
    def allocator(self) -> Allocator:
        """One threshold for all matrices."""
        return LeastError()

    def pruned(self, weight: Tensor, metric: Metric, form: Form) -> tuple[Tensor, Tensor]:
        scores = weight.abs()
        if form.spec["form"] == "sparse":
            mask = largest(scores.flatten(), form.spec["count"]).view_as(weight)
        else:
            mask = largest_of_groups(scores, form.spec["n"], form.spec["m"])
        return weight * mask, mask

    def solve(self, unit: Unit, block: Block, statistics: BlockStatistics) -> Solution:
        """As ever, with errors that compare between matrices."""
        assert isinstance(unit, Matrix)
        found = super().solve(unit, block, statistics)

        def curve() -> Curve:
            (path,) = unit.paths
            weight = inputs_by_outputs(block.module.get_submodule(path))
            scale = float(weight.double().square().sum()) / unit.hidden**2
            return Curve(tuple(error * scale for error in found.curve.errors))

        return Solution(curve, found.at)
