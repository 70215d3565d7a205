"""The contract of an allocator, and the rounding that makes any allocation meet its budget."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from secateur.calibration.needs import BlockStatistics, Need, Needs
from secateur.models.block import Block
from secateur.structure.budget import Keep
from secateur.structure.costs import Prices
from secateur.structure.error_curve import Curve
from secateur.structure.units import EVERY_BLOCK, Unit
from secateur.utils.errors import InputError
from secateur.utils.options import checked, flags_of


@dataclass(frozen=True)
class Evidence:
    """What was measured about the units on calibration data.

    Attributes:
        curves: unit name → predicted error of the unit's own output.
        readings: for each block, what the allocator has measured.
        losses: unit name → KL divergence of the model's output, in nats, when that unit alone
            is compressed; None if the allocator does not need it.
        judge: measures the KL divergence of the model with given sizes of all units, by name;
            only for allocators that search.
    """

    curves: Mapping[str, Curve]
    readings: Sequence[tuple[float, ...]] = ()
    losses: Mapping[str, Curve] | None = None
    judge: Callable[[Mapping[str, int]], float] | None = None


@dataclass(frozen=True)
class Allocator(ABC):
    """Distributes a budget over units. It works with every method whose units it supports.

    Its fields are its whole configuration, and become command-line options.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    #: whether it spends by the losses of :class:`Evidence`, which cost forward passes to measure
    measured: ClassVar[bool] = False
    #: whether it compares whole plans by the judge of :class:`Evidence`
    searches: ClassVar[bool] = False
    #: whether it looks at every block by itself
    by_blocks: ClassVar[bool] = True
    #: statistics that :meth:`read` wants
    needs: ClassVar[frozenset[Need]] = frozenset({Needs.INFLUENCE})

    @property
    def reading(self) -> str:
        """What :meth:`read` reads, with all options that it depends on."""
        return "influence"

    def read(self, block: Block, statistics: BlockStatistics) -> tuple[float, ...]:
        """What it wants to know of a dense block, beside its curves: here, the block influence."""
        return (float(statistics[Needs.INFLUENCE].mean),)

    def __post_init__(self) -> None:
        checked(self)

    @property
    def flags(self) -> str:
        """How it is asked for at the command line, with all of its options."""
        return " ".join([f"--allocator {self.name}", *flags_of(self)])

    def choices(self, unit: Unit) -> list[int]:
        """The sizes that it may give to a unit, ascending; here no unit goes altogether."""
        return [size for size in unit.sizes() if size > 0]

    def least(self, units: Sequence[Unit], prices: Prices) -> dict[str, int]:
        """The sizes that leave least of a model."""
        least = {unit.name: self.choices(unit)[0] for unit in units}
        blocks = [unit for unit in units if unit.kind == "block"]
        if blocks and not any(least[unit.name] for unit in blocks):  # one has to stay
            least[min(blocks, key=lambda unit: prices.of(unit, unit.size)).name] = 1
        return least

    def check_units(self, units: Sequence[Unit]) -> None:
        """Refuse units that it can't spend over.

        Raises:
            InputError: one runs through all blocks, and it looks at every block by itself.
        """
        through = [unit.name for unit in units if unit.block == EVERY_BLOCK]
        if self.by_blocks and through:
            raise InputError(
                f"allocator {self.name!r} goes by blocks, and unit {through[0]!r} runs through all "
                f"of them; leave the allocator out, or choose 'uniform'."
            )

    def check(self, units: Sequence[Unit], prices: Prices, keep: Keep) -> None:
        """Refuse a budget that is out of reach, before anything is measured.

        As little as there can be ("least") is always within.

        Raises:
            InputError: not even the smallest sizes meet it; the message says what is within reach.
        """
        self.check_units(units)
        if not isinstance(keep, str):
            prices.check(units, self.least(units, prices), keep, self.flags)

    def spend(
        self, units: Sequence[Unit], evidence: Evidence, prices: Prices, keep: Keep
    ) -> dict[str, int]:
        """Sizes for a share of the whole by :meth:`allocate`, or the least that there are.

        Raises:
            InputError: the budget is out of reach.
        """
        if isinstance(keep, str):
            return self.least(units, prices)
        return self.allocate(units, evidence, prices, keep)

    def judgements(self, units: Sequence[Unit], prices: Prices, keep: float) -> int:
        """How often, about, it will ask the judge; here never."""
        return 0

    def judge(self, evidence: Evidence) -> Callable[[Mapping[str, int]], float]:
        """The judge of whole plans, for an allocator that searches.

        Raises:
            InputError: there is none.
        """
        if evidence.judge is None:
            raise InputError(
                f"{self.name} judges narrowed models, and there is no judge; give make_plan the "
                "store with the statistics."
            )
        return evidence.judge

    @abstractmethod
    def allocate(
        self, units: Sequence[Unit], evidence: Evidence, prices: Prices, keep: float
    ) -> dict[str, int]:
        """Sizes whose price is at most ``keep`` of the whole, and to within one step of it.

        Raises:
            InputError: the budget is out of reach.
        """


class ShareAllocator(Allocator):
    """An allocator that decides which share of its size each unit keeps."""

    @abstractmethod
    def shares(
        self, units: Sequence[Unit], evidence: Evidence, prices: Prices, keep: float
    ) -> dict[str, float]:
        """The share of every unit, before rounding; ``keep`` is of what these units cost."""

    def allocate(
        self, units: Sequence[Unit], evidence: Evidence, prices: Prices, keep: float
    ) -> dict[str, int]:
        """The shares, rounded to allowed sizes that spend the budget."""
        self.check(units, prices, keep)
        whole, still = prices.whole(units), prices.still(units)
        # Where nothing that changes has a price, keep is 1.
        share = max(0.0, (keep * whole - still) / (whole - still)) if whole > still else 1.0
        shares = self.shares([u for u in units if not u.fixed], evidence, prices, share)
        ideal = {u.name: u.size if u.fixed else u.at_share(shares[u.name]) for u in units}
        allowed = {unit.name: self.choices(unit) for unit in units}
        return fit(units, allowed, ideal, prices, prices.budget(units, keep))


class BlockAllocator(ShareAllocator):
    """A share allocator that gives all units of a block one share, from one number per block."""

    def shares(
        self, units: Sequence[Unit], evidence: Evidence, prices: Prices, keep: float
    ) -> dict[str, float]:
        """The share of the unit's block."""
        weights = dict.fromkeys(sorted({unit.block for unit in units}), 0)
        for unit in units:
            weights[unit.block] += prices.of(unit, unit.size)
        values = [evidence.readings[block][0] for block in weights]
        found = self.of_blocks(values, list(weights.values()), keep) if units else []
        share = dict(zip(weights, found, strict=True))
        return {unit.name: share[unit.block] for unit in units}

    @abstractmethod
    def of_blocks(
        self, values: Sequence[float], weights: Sequence[float], keep: float
    ) -> list[float]:
        """A share per block that has units, of which the mean by ``weights`` is ``keep``.

        ``values`` are what was read from these blocks, ``weights`` the prices of their units.
        """


def poured(
    logs: Sequence[float], weights: Sequence[float], mean: float, most: float
) -> list[float]:
    """min(most, c · exp(log)) each, with the c at which the mean by ``weights`` is ``mean``.

    What ``most``, at least ``mean``, cuts off goes to the others (water-filling), so the mean is
    exact. 0 where there is no weight.
    """
    found = [0.0] * len(logs)
    free = {i for i in range(len(logs)) if weights[i] > 0}
    while free:
        capped = sum(weights[i] * found[i] for i in range(len(logs)) if i not in free)
        # Shifting all exponents changes nothing but keeps the largest of them at 1.
        highest = max(logs[i] for i in free)
        scale = {i: math.exp(logs[i] - highest) for i in free}
        mass = sum(weights[i] * scale[i] for i in free)
        level = max(0.0, mean * sum(weights) - capped) / mass
        over = {i for i in free if level * scale[i] > most * (1 + 1e-12)}
        for i in over or free:
            found[i] = most if over else level * scale[i]
        free -= over or free
    return found


def fit(
    units: Sequence[Unit],
    allowed: Mapping[str, list[int]],
    ideal: Mapping[str, float],
    prices: Prices,
    budget: int,
) -> dict[str, int]:
    """Allowed sizes near ``ideal`` (fractional sizes) that spend the budget and never exceed it.

    Every size is first rounded down; then the units furthest below their ideal grow step by step
    as long as a step still fits. What is left over is less than the cheapest step.
    """
    at = {
        unit.name: max(0, sum(size <= ideal[unit.name] + 1e-9 for size in allowed[unit.name]) - 1)
        for unit in units
    }

    def price(unit: Unit, index: int) -> int:
        return prices.of(unit, allowed[unit.name][index])

    def lack(unit: Unit) -> float:  # in steps, so that units of different grain compare
        return (ideal[unit.name] - allowed[unit.name][at[unit.name]]) / unit.step

    spent = prices.fixed + sum(price(unit, at[unit.name]) for unit in units)
    while spent > budget:  # some unit was lifted to its smallest size, or prices are not in line
        unit = min((u for u in units if at[u.name] > 0), key=lack)
        spent += price(unit, at[unit.name] - 1) - price(unit, at[unit.name])
        at[unit.name] -= 1
    while True:
        growing = [
            u
            for u in units
            if at[u.name] + 1 < len(allowed[u.name])
            and spent + price(u, at[u.name] + 1) - price(u, at[u.name]) <= budget
        ]
        if not growing:
            return {unit.name: allowed[unit.name][at[unit.name]] for unit in units}
        unit = max(growing, key=lack)
        spent += price(unit, at[unit.name] + 1) - price(unit, at[unit.name])
        at[unit.name] += 1


def places(units: Sequence[Unit]) -> dict[int, tuple[int, int]]:
    """Of every block its place in its stack, and how many blocks that stack has."""
    stacks: dict[str, list[int]] = {}
    for unit in units:
        stacks.setdefault(unit.stack, []).append(unit.block)
    return {
        block: (block - min(stack), 1 + max(stack) - min(stack))
        for stack in stacks.values()
        for block in stack
    }
