"""Structured pruning by output norm: a method of Secateur in a package of its own."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.extend import (
    MOMENTS,
    Block,
    BlockStatistics,
    Need,
    ScoredMethod,
    Uniform,
    Unit,
    option,
)


@dataclass(frozen=True)
class OutputNorm(ScoredMethod):
    """Removes the channels and KV heads that add least to the output.

    With x_j what channel j carries and W_j the weights that read it, s_j = (E x_j²)^(power/2) ‖W_j‖
    is its score. A head's is the sum over its coordinates. A baseline: correlations are not looked
    at, and nothing is refitted.
    """

    power: float = option(1.0, "exponent of the activations' norm; 0 is weights alone", 0.0)

    name: ClassVar[str] = "example-norm"
    summary: ClassVar[str] = "channels and heads of least output norm"
    source: ClassVar[str] = "the example of docs/extending.md"
    needs: ClassVar[frozenset[Need]] = frozenset(MOMENTS.values())

    @property
    def allocator(self) -> Uniform:
        """The same share of every unit."""
        return Uniform()

    def scores(self, unit: Unit, block: Block, statistics: BlockStatistics) -> Tensor:
        """What each channel or KV head is worth, float64, (size)."""
        axis = block.axis(unit)
        rows = axis.read()  # size, coordinates of each, outputs
        mean, energy = statistics[MOMENTS[unit.kind]].mean.unbind()
        if (constant := axis.constant) is not None:  # value biases, which the statistic leaves out
            energy = energy + (2 * mean + constant) * constant
        norms = energy.clamp_min(0.0).sqrt().view(rows.shape[:2]) ** self.power
        return (norms * rows.norm(dim=2)).sum(1)
