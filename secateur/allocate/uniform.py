"""The same ratio for every unit."""

from collections.abc import Sequence

from secateur.allocate.base import Allocator, Evidence
from secateur.units import Unit


class Uniform(Allocator):
    """Keep the same share of every unit; the baseline that other allocations must beat."""

    def shares(self, units: Sequence[Unit], evidence: Evidence, keep: float) -> dict[str, float]:
        """``keep`` for all."""
        return {unit.name: keep for unit in units}
