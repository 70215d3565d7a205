"""One budget over all units, spent where it saves most of the measured loss."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from secateur.allocate.base import Allocator, Evidence
from secateur.structure.costs import Prices
from secateur.structure.error_curve import Curve
from secateur.structure.units import Unit, unread
from secateur.utils.errors import InputError
from secateur.utils.options import option


class GroupSizes(NamedTuple):
    """Possible sizes for the units of one group, with their costs and losses."""

    price: int
    loss: float
    sizes: dict[str, int]


@dataclass(frozen=True)
class Knapsack(Allocator):
    """Find the sizes with the smallest sum of losses within the budget by dynamic programming.

    With loss_u(k) the measured divergence of the model's output while unit u alone has size k,

        min Σ_u loss_u(k_u)   subject to   Σ_u price_u(k_u) ≤ budget

    A unit can be removed completely. If values are removed, their queries and keys are removed too,
    so an attention is one group g of two units. The smallest loss at each cost is computed group by
    group,

        best_g(c) = min_k best_{g−1}(c − price_g(k)) + loss_g(k)

    exactly if the costs are multiples of some amount that is at least 1/``cells`` of the budget.
    Otherwise costs are rounded up, and what is left over is spent greedily. Don't use it if losses
    can't be measured: the error curves of different units are not comparable.

    Source: multiple-choice knapsack; losses added up over modules as in SPDY (arXiv 2202.06749).
    """

    cells: int = option(20_000, "resolution of the budget; larger is finer and slower", 100)

    name: ClassVar[str] = "knapsack"
    summary: ClassVar[str] = (
        "smallest sum of measured losses over all units; can remove whole units"
    )
    source: ClassVar[str] = "dynamic programming"
    measured: ClassVar[bool] = True

    def choices(self, unit: Unit) -> list[int]:
        """All sizes, none included."""
        return unit.sizes()

    def allocate(
        self, units: Sequence[Unit], evidence: Evidence, prices: Prices, keep: float
    ) -> dict[str, int]:
        """The sizes of least loss."""
        losses = self.losses(evidence)
        self.check(units, prices, keep)
        budget = prices.budget(units, keep) - prices.fixed
        groups = [
            self._group(list(own), prices, losses)
            for _, own in groupby(units, key=lambda unit: unit.together)
        ]
        spare = budget - sum(group[0].price for group in groups)
        measure = math.gcd(*(c.price - group[0].price for group in groups for c in group)) or 1
        if spare // measure > self.cells:
            measure = math.ceil(spare / self.cells)
        chosen = least_loss(groups, measure, spare // measure)
        chosen = _spend(groups, chosen, budget)
        return {name: size for choice in chosen for name, size in choice.sizes.items()}

    def losses(self, evidence: Evidence) -> Mapping[str, Curve]:
        """What is summed.

        Raises:
            InputError: it was not measured.
        """
        if evidence.losses is None:
            raise InputError(
                "the knapsack spends by measured losses, and there are none; ask for them with "
                "score(..., allocator=Knapsack())."
            )
        return evidence.losses

    def _group(
        self, units: list[Unit], prices: Prices, losses: Mapping[str, Curve]
    ) -> list[GroupSizes]:
        """The choices of a group from the cheapest on, none worse than one that is cheaper."""
        choices = []
        for sizes in product(*(self.choices(unit) for unit in units)):
            named = {unit.name: size for unit, size in zip(units, sizes, strict=True)}
            idle = unread(units, named)
            if any(named[name] for name in idle):
                continue  # queries and keys without values
            price = sum(prices.of(unit, named[unit.name]) for unit in units)
            loss = sum(losses[u.name].at(named[u.name]) for u in units if u.name not in idle)
            choices.append(GroupSizes(price, loss, named))
        better: list[GroupSizes] = []
        for choice in sorted(choices, key=lambda c: (c.price, c.loss)):
            if better and choice.loss > better[-1].loss:
                continue
            if better and choice.price == better[-1].price:
                better.pop()  # as good, but smaller
            better.append(choice)
        return better


def least_loss(groups: Sequence[list[GroupSizes]], measure: int, room: int) -> list[GroupSizes]:
    """One choice a group with the least sum of losses.

    Prices above a group's cheapest are rounded up to whole multiples of ``measure``, of which
    ``room`` may be spent.
    """
    best: NDArray[np.float64] = np.zeros(room + 1)
    picks = []
    for group in groups:
        cells = [-(-(choice.price - group[0].price) // measure) for choice in group]
        after, pick = np.full(room + 1, np.inf), np.zeros(room + 1, dtype=np.int32)
        for index, (choice, cell) in enumerate(zip(group, cells, strict=True)):
            if cell > room:
                break
            candidate = best[: room + 1 - cell] + choice.loss
            wins = candidate <= after[cell:]  # of equals the larger
            after[cell:][wins], pick[cell:][wins] = candidate[wins], index
        best = after
        picks.append((cells, pick))
    at, chosen = room, []
    for group, (cells, pick) in zip(reversed(groups), reversed(picks), strict=True):
        index = int(pick[at])
        chosen.append(group[index])
        at -= cells[index]
    return chosen[::-1]


def _spend(
    groups: Sequence[list[GroupSizes]], chosen: list[GroupSizes], budget: int
) -> list[GroupSizes]:
    """What rounding left over, spent step by step on the group that gains most by it."""
    left = budget - sum(choice.price for choice in chosen)
    while True:
        steps = [
            ((now.loss - choice.loss) / (choice.price - now.price), index, choice)
            for index, (group, now) in enumerate(zip(groups, chosen, strict=True))
            for choice in group
            if now.price < choice.price <= now.price + left
        ]
        if not steps:
            return chosen
        _, index, choice = max(steps, key=lambda step: step[0])
        left -= choice.price - chosen[index].price
        chosen[index] = choice
