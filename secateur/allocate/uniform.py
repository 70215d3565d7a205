"""The same share of every unit."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from secateur.allocate.base import Evidence, ShareAllocator
from secateur.structure.costs import Prices
from secateur.structure.units import Unit


@dataclass(frozen=True)
class Uniform(ShareAllocator):
    """Keep the same share of every unit. This is the baseline for other allocators."""

    name: ClassVar[str] = "uniform"
    summary: ClassVar[str] = "the same share of every unit"
    source: ClassVar[str] = "a baseline"
    by_blocks: ClassVar[bool] = False

    def shares(
        self, units: Sequence[Unit], evidence: Evidence, prices: Prices, keep: float
    ) -> dict[str, float]:
        """``keep`` for all."""
        return {unit.name: keep for unit in units}
