"""What a budget counts: parameters, bytes, operations, cache or measured time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from secateur.structure.budget import Target
from secateur.structure.units import Unit
from secateur.utils.errors import InputError

MEANING: dict[Target, str] = {
    "parameters": "parameters",
    "bytes": "bytes on disk",
    "flops": "operations a token",
    "cache": "bytes of KV cache a token",
    "latency": "nanoseconds of a forward pass",
}


@dataclass(frozen=True)
class Prices:
    """The price of every size of every unit, in whole numbers of one currency.

    Attributes:
        target: the currency.
        table: unit name → size → price.
        fixed: what no size changes but the budget counts all the same.
    """

    target: Target
    table: Mapping[str, Mapping[int, int]]
    fixed: int = 0

    def of(self, unit: Unit, size: int) -> int:
        """The price of a unit at a size."""
        return self.table[unit.name][size]

    def spent(self, units: Sequence[Unit], sizes: Mapping[str, int]) -> int:
        """The price of all units together, and what is fixed."""
        return self.fixed + sum(self.of(unit, sizes[unit.name]) for unit in units)

    def whole(self, units: Sequence[Unit]) -> int:
        """The price of the dense model."""
        return self.spent(units, {unit.name: unit.size for unit in units})

    def still(self, units: Sequence[Unit]) -> int:
        """The price of what no size changes, units of one size included."""
        return self.fixed + sum(self.of(unit, unit.size) for unit in units if unit.fixed)

    def budget(self, units: Sequence[Unit], keep: float) -> int:
        """``keep`` of the whole, in whole numbers; 0.29 of 100 is 29, whatever floats say."""
        return int(keep * self.whole(units) * (1 + 1e-12))

    def check(
        self, units: Sequence[Unit], least: Mapping[str, int], keep: float, flags: str
    ) -> None:
        """Refuse a budget that not even ``least`` meets, the smallest sizes that ``flags`` allow.

        Raises:
            InputError: it is out of reach; the message says what is within, or what stands in the
                way.
        """
        whole, meaning = self.whole(units), MEANING[self.target]
        if whole == self.fixed:
            raise InputError(
                f"no size changes the {meaning} of this model. Choose another --target or --method."
            )
        moving = [unit for unit in units if len(set(self.table[unit.name].values())) > 1]
        held = [unit for unit in moving if least[unit.name] == unit.size]
        floor = self.spent(units, least)
        if floor > self.budget(units, keep):
            if floor == whole:
                reason = "the method or the model keeps those that would. Another --method or"
                if held:
                    kinds = ", ".join(dict.fromkeys(unit.kind for unit in held))
                    reason = f"{flags} keeps those that would ({kinds}). Other options, or another"
                raise InputError(
                    f"keep {keep:.3f} is out of reach: no size that may change here changes the "
                    f"{meaning}; {reason} --target may."
                )
            ends = f", as {flags} keeps {len(held)} of {len(moving)} units whole" if held else ""
            raise InputError(
                f"keep {keep:.3f} is out of reach: with every unit at its smallest the model still "
                f"keeps {floor / whole:.3f} of its {meaning} ({floor:,} of {whole:,}){ends}. Ask "
                f"for between {floor / whole + 0.0005:.3f} and 1."
            )


def counted(units: Sequence[Unit], target: Target, itemsize: int) -> Prices:
    """Prices that need no measuring, when a stored number takes ``itemsize`` bytes."""

    def price(unit: Unit, size: int) -> int:
        cost = unit.cost(size, itemsize)
        return {
            "parameters": cost.parameters,
            "bytes": cost.bytes,
            "flops": cost.flops_per_token,
            "cache": cost.cache_bytes_per_token,
        }[target]

    return Prices(target, {u.name: {s: price(u, s) for s in u.sizes()} for u in units})
