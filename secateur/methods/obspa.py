"""OBSPA: channels and heads ranked once by optimal brain surgeon scores."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from secateur.allocate.base import Allocator
from secateur.allocate.uniform import Uniform
from secateur.calibration.needs import BlockStatistics
from secateur.linalg.least_squares import damped_cholesky
from secateur.methods.base import Solution
from secateur.methods.refitted import RefittedMethod, in_order, problem
from secateur.models.block import Block
from secateur.structure.units import Unit


@dataclass(frozen=True)
class OBSPA(RefittedMethod):
    """Prune channels and heads by one optimal brain surgeon score each, then refit once.

    With H = C + λI of what W reads and M the coordinates of a channel or KV head,

        s_M = Σ_{j ∈ M} ‖W_j‖² / [H⁻¹]_jj
        W_S ← W_S − [H⁻¹]_SR ([H⁻¹]_RR)⁻¹ W_R      for all R that go

    It is cheaper than ZipLM, because no score is computed again. Don't use it below about 0.7: of
    two channels that are redundant with each other, both get a low score, and both are removed.

    Source: Wang et al., "Structurally Prune Anything: Any Architecture, Any Framework, Any Time",
    arXiv 2403.18955, OBSPA.
    """

    name: ClassVar[str] = "obspa"
    summary: ClassVar[str] = "prunes channels and heads by one OBS score each, then refits"
    source: ClassVar[str] = "arXiv 2403.18955"

    @property
    def allocator(self) -> Allocator:
        """One ratio for all."""
        return Uniform()

    def solve(self, unit: Unit, block: Block, statistics: BlockStatistics) -> Solution:
        """The largest scores stay."""
        gram, weight, width = problem(unit, block, statistics)
        factor, _ = damped_cholesky(gram, self.ridge, unit.name)
        scores = weight.square().sum(1) / torch.cholesky_inverse(factor).diagonal()
        groups = scores.view(-1, width).sum(1)
        order = torch.sort(groups, descending=True, stable=True).indices
        return in_order(unit, block, statistics, order, self.ridge)
