"""One MLP width for all blocks, so that stock classes load the result."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from secateur.allocate.base import Allocator, Evidence
from secateur.structure.costs import Prices
from secateur.structure.units import Unit


@dataclass(frozen=True)
class PlainWidth(Allocator):
    """The largest common MLP width that fits the budget; attention keeps its shape.

    Don't use it if the result can contain its own modelling code: other allocations have more
    freedom at the same size.
    """

    name: ClassVar[str] = "plain"
    summary: ClassVar[str] = (
        "one MLP width for all blocks, attention unchanged; used by --tier plain"
    )
    source: ClassVar[str] = "a constraint of stock classes"
    by_blocks: ClassVar[bool] = False

    @property
    def flags(self) -> str:
        """A tier, at the command line."""
        return "--tier plain"

    def choices(self, unit: Unit) -> list[int]:
        """Every width of an MLP, and today's of anything else."""
        return super().choices(unit) if unit.kind == "mlp" else [unit.size]

    def allocate(
        self, units: Sequence[Unit], evidence: Evidence, prices: Prices, keep: float
    ) -> dict[str, int]:
        """The same MLP size everywhere."""
        self.check(units, prices, keep)
        budget, mlps = prices.budget(units, keep), [u for u in units if u.kind == "mlp"]
        if not mlps:
            return {unit.name: unit.size for unit in units}
        common = set.intersection(*(set(self.choices(unit)) for unit in mlps))
        whole = {unit.name: unit.size for unit in units}
        options = [whole | {unit.name: size for unit in mlps} for size in sorted(common)]
        return max(
            (sizes for sizes in options if prices.spent(units, sizes) <= budget),
            key=lambda sizes: sizes[mlps[0].name],
        )
