"""LLM-Pruner's allocation: prunes the middle blocks equally, the first and last not at all."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from secateur.allocate.base import Allocator, Evidence, fit, places
from secateur.structure.costs import Prices
from secateur.structure.units import Unit
from secateur.utils.options import option


@dataclass(frozen=True)
class Middle(Allocator):
    """Prune all units of the middle blocks by one share; leave the first and last blocks unchanged.

    With the budget B and the costs P_in, P_out of the units in the middle and at the ends,

        share = (B − P_out) / P_in   in the middle,   1 at the ends

    so ``keep`` refers to the whole model and not to the middle blocks. Of 32 blocks, the defaults
    exclude the first four and the last two, as published; of a few blocks, they exclude none. An
    encoder and a decoder each have their own ends. Don't use it if losses can be measured: they
    show which blocks matter.

    Source: arXiv 2305.11627, and its published script for the ends.
    """

    first: float = option(
        0.125, "share of the blocks, from the first on, that is not pruned", 0.0, 1.0
    )
    last: float = option(
        0.0625, "share of the blocks, up to the last, that is not pruned", 0.0, 1.0
    )

    name: ClassVar[str] = "middle"
    summary: ClassVar[str] = (
        "one share for the middle blocks; the first and last blocks are not pruned"
    )
    source: ClassVar[str] = "arXiv 2305.11627"

    def whole(self, units: Sequence[Unit]) -> set[str]:
        """Names of the units at the ends and of those that can't shrink.

        Shares of blocks are rounded down.
        """
        where = places(units)

        def within(unit: Unit) -> bool:
            place, blocks = where[unit.block]
            low, high = int(self.first * blocks + 1e-9), blocks - int(self.last * blocks + 1e-9)
            return low <= place < high

        return {unit.name for unit in units if unit.fixed or not within(unit)}

    def allowed(self, units: Sequence[Unit]) -> dict[str, list[int]]:
        """Today's size at the ends, any within."""
        whole = self.whole(units)
        return {u.name: [u.size] if u.name in whole else self.choices(u) for u in units}

    def least(self, units: Sequence[Unit], prices: Prices) -> dict[str, int]:
        """The ends stay whole, too."""
        whole = self.whole(units)
        return super().least(units, prices) | {u.name: u.size for u in units if u.name in whole}

    def allocate(
        self, units: Sequence[Unit], evidence: Evidence, prices: Prices, keep: float
    ) -> dict[str, int]:
        """One share for all units within, rounded to sizes that spend the budget."""
        self.check(units, prices, keep)
        whole, budget = self.whole(units), prices.budget(units, keep)
        price = {unit.name: prices.of(unit, unit.size) for unit in units}
        ends = sum(price[name] for name in whole)
        within = sum(price.values()) - ends
        share = max(0.0, (keep * prices.whole(units) - prices.fixed - ends) / max(within, 1))
        ideal = {u.name: u.size * (1.0 if u.name in whole else share) for u in units}
        return fit(units, self.allowed(units), ideal, prices, budget)
