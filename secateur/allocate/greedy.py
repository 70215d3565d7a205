"""Greedy removal of whole units, each time the one that changes the output least."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

from secateur.allocate.base import Allocator, Evidence, places
from secateur.structure.costs import Prices
from secateur.structure.units import Unit
from secateur.utils.options import option


@dataclass(frozen=True)
class Greedy(Allocator):
    """Remove whole units greedily; each candidate is evaluated on the whole model.

    With R the units that are gone and D(R) the divergence of the model without them,

        R ← R ∪ {argmin_u D(R ∪ {u})}   until Σ_{u ∉ R} price_u ≤ budget

    The first and the last ``ends`` blocks, of an encoder and a decoder each, lose nothing, and an
    attention goes as one. What the last step freed too much of comes back, as far as it fits, the
    last to go first. To take n of L units takes some n · L judgements, of half a forward pass each
    where units are blocks. Don't use it over many small units.

    Source: Song et al., "SLEB: Streamlining LLMs through Redundancy Verification and Elimination of
    Transformer Blocks", arXiv 2402.09025, algorithm 1.
    """

    ends: int = option(1, "number of first and of last blocks that are not pruned", 0)

    name: ClassVar[str] = "greedy"
    summary: ClassVar[str] = (
        "removes whole units one by one, each time the one that changes the output least"
    )
    source: ClassVar[str] = "arXiv 2402.09025"
    searches: ClassVar[bool] = True

    def choices(self, unit: Unit) -> list[int]:
        """All or, where it may go, nothing."""
        return [unit.size] if unit.least else [0, unit.size]

    def least(self, units: Sequence[Unit], prices: Prices) -> dict[str, int]:
        """Nothing of all that may go."""
        least = {unit.name: unit.size for unit in units}
        for group in self._groups(units):
            least |= {unit.name: 0 for unit in group}
        smallest = super().least(units, prices)  # which knows that some block has to stay
        return {name: size or smallest[name] for name, size in least.items()}

    def judgements(self, units: Sequence[Unit], prices: Prices, keep: float) -> int:
        """All that is left, each time; as many times as if all that may go had one price."""
        left = self._groups(units)
        freed = sum(prices.of(unit, unit.size) for group in left for unit in group)
        excess = prices.whole(units) - prices.budget(units, keep)
        times = min(len(left), math.ceil(excess * len(left) / max(freed, 1)))
        return sum(len(left) - gone for gone in range(times))

    def allocate(
        self, units: Sequence[Unit], evidence: Evidence, prices: Prices, keep: float
    ) -> dict[str, int]:
        """What is left when the budget is met."""
        judge = self.judge(evidence)
        self.check(units, prices, keep)
        budget, sizes = prices.budget(units, keep), {unit.name: unit.size for unit in units}
        left, gone = self._groups(units), []
        while prices.spent(units, sizes) > budget:
            losses = [judge(sizes | {unit.name: 0 for unit in group}) for group in left]
            gone.append(left.pop(losses.index(min(losses))))
            sizes |= {unit.name: 0 for unit in gone[-1]}
        for group in reversed(gone):
            back = sizes | {unit.name: unit.size for unit in group}
            if prices.spent(units, back) <= budget:
                sizes = back
        return sizes

    def _groups(self, units: Sequence[Unit]) -> list[list[Unit]]:
        """What may go, as it goes."""
        where = places(units)
        groups = [list(own) for _, own in groupby(units, key=lambda unit: unit.together)]
        free = [group for group in groups if not any(unit.least for unit in group)]
        return [group for group in free if self._inside(*where[group[0].block])]

    def _inside(self, place: int, blocks: int) -> bool:
        return self.ends <= place < blocks - self.ends
