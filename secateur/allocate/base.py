"""The contract of an allocator, and the rounding that makes any allocation meet its budget."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from secateur.curve import Curve
from secateur.errors import InputError
from secateur.statistics import Need
from secateur.units import Unit


@dataclass(frozen=True)
class Evidence:
    """What calibration says about the units: predicted errors, and the influence of each block."""

    curves: Mapping[str, Curve]
    influence: Sequence[float]


class Allocator(ABC):
    """Spends a budget over units. Every allocator serves every method."""

    needs: ClassVar[frozenset[Need]] = frozenset()

    @abstractmethod
    def shares(self, units: Sequence[Unit], evidence: Evidence, keep: float) -> dict[str, float]:
        """The share of its size that each unit should keep, before rounding."""

    def allocate(self, units: Sequence[Unit], evidence: Evidence, keep: float) -> dict[str, int]:
        """Sizes whose parameters sum to at most ``keep`` of all, and to within one step of it."""
        shares = self.shares(units, evidence, keep)
        ideal = {unit.name: shares[unit.name] * unit.size for unit in units}
        return fit(units, ideal, budget_of(units, keep))


def budget_of(units: Sequence[Unit], keep: float) -> int:
    """``keep`` of the units' parameters, in whole numbers."""
    return int(keep * sum(unit.parameters(unit.size) for unit in units))


def check_budget(units: Sequence[Unit], budget: int) -> None:
    """Refuse a budget that not even the smallest sizes meet.

    Raises:
        InputError: it is out of reach; the message says what is within.
    """
    least = sum(unit.parameters(unit.sizes()[0]) for unit in units)
    whole = sum(unit.parameters(unit.size) for unit in units)
    if least > budget:
        raise InputError(
            f"keep {budget / whole:.3f} is out of reach: the smallest sizes these units may take "
            f"already keep {least / whole:.3f}. Ask for between {least / whole + 0.0005:.3f} and 1."
        )


def fit(units: Sequence[Unit], ideal: Mapping[str, float], budget: int) -> dict[str, int]:
    """Allowed sizes near ``ideal`` (fractional sizes) that spend the budget and never exceed it.

    Every size is first rounded down; then the units furthest below their ideal grow step by step
    as long as a step still fits. What is left over is less than the cheapest step.

    Raises:
        InputError: the smallest sizes together cost more than the budget.
    """
    check_budget(units, budget)
    allowed = {unit.name: unit.sizes() for unit in units}
    at = {
        unit.name: max(0, sum(size <= ideal[unit.name] + 1e-9 for size in allowed[unit.name]) - 1)
        for unit in units
    }

    def price(unit: Unit, index: int) -> int:
        return unit.parameters(allowed[unit.name][index])

    def lack(unit: Unit) -> float:  # in steps, so that units of different grain compare
        return (ideal[unit.name] - allowed[unit.name][at[unit.name]]) / unit.step

    spent = sum(price(unit, at[unit.name]) for unit in units)
    while spent > budget:  # some unit was lifted to its smallest size
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
