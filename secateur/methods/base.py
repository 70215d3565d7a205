"""The contract of a method: score an axis, and say what replaces it at a size."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from secateur.block import Block
from secateur.curve import Curve
from secateur.errors import InputError
from secateur.statistics import BlockStatistics, Need
from secateur.units import Unit

if TYPE_CHECKING:
    from secateur.allocate.base import Allocator


@dataclass(frozen=True)
class Narrowing:
    """What replaces an axis z of width n by one of width k: z W becomes (z E) Ŵ.

    Attributes:
        keep: the kept coordinates, in order: (k) for an MLP, (kv heads, k) for query/key. None
            where E is a dense basis.
        encode: E, (kv heads, n, k), multiplied into the values, or into the queries of the heads
            that read a KV head, whose keys are selected. None where E selects.
        consumer: Ŵ in place of the consumer's rows: (k, outputs) for an MLP, (heads · k, outputs)
            for value/output. None leaves the kept rows as they are.
    """

    keep: Tensor | None = None
    encode: Tensor | None = None
    consumer: Tensor | None = None


@dataclass(frozen=True)
class Solution:
    """A method's answer for one unit, at every size it may take.

    Attributes:
        curve: predicted error of the unit's output.
        at: what replaces the unit at a size.
    """

    curve: Curve
    at: Callable[[int], Narrowing]


def option(default: Any, help: str, low: float | None = None, high: float | None = None) -> Any:
    """A method's field with its help text and the interval of its values, ends included."""
    return field(default=default, metadata={"help": help, "low": low, "high": high})


@dataclass(frozen=True)
class Method(ABC):
    """One paper. Its fields are its whole configuration; constructing it only stores and checks.

    Command-line flags and Python arguments come from the same fields, so they cannot differ.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    needs: ClassVar[frozenset[Need]]
    #: whether :meth:`compress` is given statistics from behind the blocks narrowed before
    sequential: ClassVar[bool] = False
    keep: float

    def __post_init__(self) -> None:
        for f in fields(self):
            value, low, high = getattr(self, f.name), f.metadata.get("low"), f.metadata.get("high")
            expected = type(f.default)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                if isinstance(value, expected):
                    continue
                raise InputError(
                    f"{self.name}: {f.name}={value!r} should be a {expected.__name__}."
                )
            if expected is int and not isinstance(value, int):
                raise InputError(f"{self.name}: {f.name}={value!r} should be a whole number.")
            if not (low is None or value >= low) or not (high is None or value <= high):
                bounds = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
                raise InputError(f"{self.name}: {f.name}={value!r} should be {bounds}.")
        if not 0 < self.keep <= 1:
            raise InputError(f"keep {self.keep!r} should be above 0 and at most 1, e.g. 0.8.")

    @property
    @abstractmethod
    def allocator(self) -> "Allocator":
        """What spends the budget when nothing else is asked for."""

    @abstractmethod
    def solve(self, unit: Unit, block: Block, statistics: BlockStatistics) -> Solution:
        """The unit at every size; touches no weight."""
