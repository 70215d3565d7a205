"""Structured pruning by output energy: a method of Secateur in a package of its own."""

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
class OutputEnergy(ScoredMethod):
    """Removes the channels and KV heads that add least energy to the output.

    With x_j what channel j carries and W_j the row that reads it, s_j = (E x_j²)^power · ‖W_j‖².
    A baseline: correlations between channels are not looked at, and nothing is refitted.
    """

    power: float = option(1.0, "exponent of the activations' mean square; 0 is weights alone", 0.0)

    name: ClassVar[str] = "example-energy"
    summary: ClassVar[str] = "channels and heads of least output energy"
    source: ClassVar[str] = "the example of docs/extending.md"
    needs: ClassVar[frozenset[Need]] = frozenset(MOMENTS.values())

    @property
    def allocator(self) -> Uniform:
        """The same share of every unit."""
        return Uniform()

    def scores(self, unit: Unit, block: Block, statistics: BlockStatistics) -> Tensor:
        """Energy of each channel or KV head, float64, (size)."""
        rows = block.read(unit.kind)  # size, coordinates of each, outputs
        _, energy = statistics[MOMENTS[unit.kind]].mean.unbind()
        energy = energy.clamp_min(0.0).view(rows.shape[:2]) ** self.power
        return (energy * rows.square().sum(2)).sum(1)
