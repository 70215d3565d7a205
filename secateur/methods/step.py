"""One method with what it may spend and what spends that."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from secateur.allocate.base import Allocator
from secateur.allocate.plain import PlainWidth
from secateur.methods.base import Method
from secateur.methods.fitted import FittedMethod, OwnSizes
from secateur.structure.budget import Budget
from secateur.structure.runtime_limits import fitted
from secateur.structure.units import DEPTH, MATRICES, Unit
from secateur.utils.errors import InputError

if TYPE_CHECKING:
    from secateur.models.model import Model


@dataclass(frozen=True)
class Step:
    """A method, its budget and its allocator: all that decides the sizes of a model's units.

    Attributes:
        method: what scores the units, and says what replaces each of them at a size.
        budget: how much stays. In a recipe a ``keep`` of None is left to the recipe's own.
        allocator: what spends the budget over the units.
    """

    method: Method
    budget: Budget
    allocator: Allocator

    @classmethod
    def of(
        cls, method: Method, budget: Budget | None = None, allocator: Allocator | None = None
    ) -> "Step":
        """A step whose allocator is, where none is given, what the tier demands or the method's.

        Raises:
            InputError: the tier or the method leaves nothing to allocate, and an allocator is
                given; or the tier has no place for the sizes that the method decides.
        """
        budget = budget or Budget()
        if isinstance(method, FittedMethod):
            return cls(method, budget, _own_sizes(method, budget, allocator))
        # whole blocks and matrices leave no odd shapes
        shaped = budget.tier == "plain" and method.kinds not in (DEPTH, MATRICES)
        if shaped and not isinstance(allocator, PlainWidth | None):
            raise InputError(
                f"--tier plain has one MLP width and nothing to allocate. Leave out "
                f"{allocator.flags}, as far as given, or ask for --tier per-layer."
            )
        return cls(method, budget, allocator or (PlainWidth() if shaped else method.allocator))

    @property
    def filled(self) -> "Step":
        """The same with the method's usual ``keep`` and ``target`` where the budget has none."""
        return Step(self.method, self.budget.of(self.method), self.allocator)

    def units(self, model: "Model") -> list[Unit]:
        """The units of the method, with the sizes that the budget leaves them."""
        found = self.method.units(model, self.budget.multiple_of)
        return [fitted(unit, self.budget.runtime) for unit in found]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as a recipe's file has it."""
        return {
            "method": self.method.name,
            "options": asdict(self.method),
            **self._allocator_as_dict(),
            **self.budget.as_dict(),
        }

    def _allocator_as_dict(self) -> dict[str, Any]:
        if isinstance(self.method, FittedMethod):
            return {"allocator": None}
        return {"allocator": self.allocator.name, "allocator_options": asdict(self.allocator)}


def _own_sizes(method: FittedMethod, budget: Budget, allocator: Allocator | None) -> Allocator:
    """What stands for the allocator of a method that decides all sizes itself."""
    if allocator is not None and not isinstance(allocator, OwnSizes):
        raise InputError(
            f"method {method.name!r} decides all sizes itself; leave out {allocator.flags}."
        )
    if budget.tier == "plain":
        raise InputError(
            f"--tier plain has one MLP width, and method {method.name!r} gives every unit its own "
            f"size. Ask for --tier per-layer, or choose another --method."
        )
    return method.allocator
