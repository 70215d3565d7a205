"""The contract of a method that decides all sizes and coordinates at once, within a budget."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from secateur.allocate.base import Allocator, Evidence
from secateur.calibration.collect import Store
from secateur.data.tokens import Tokens
from secateur.methods.base import Method
from secateur.structure.costs import Prices
from secateur.structure.selection import Selection
from secateur.structure.units import Unit
from secateur.utils.errors import InputError, RunError

if TYPE_CHECKING:
    from secateur.models.model import Model


@dataclass(frozen=True)
class FitData:
    """What a method is fitted on.

    Attributes:
        tokens: the calibration windows.
        store: the statistics of every block; None where there are none.
    """

    tokens: Tokens
    store: Store | None = None


class FittedMethod(Method):
    """A method that looks at the whole model and decides which coordinates of all units stay.

    For what is learned by gradients or searched as a whole, such as masks: the sizes come with it,
    so it takes no allocator. :meth:`solve` says, as for every method, what replaces a unit: of a
    selection by ``keeping``, and by ``at`` for sizes that people give by hand. Don't use it for a
    method that scores each unit by itself; an allocator then serves it as well.
    """

    @abstractmethod
    def fit(
        self,
        model: "Model",
        units: Sequence[Unit],
        costs: Prices,
        budget: int,
        data: FitData,
    ) -> Selection:
        """Which coordinates stay; a unit that is not named keeps its size.

        The sizes are allowed ones (``unit.sizes()``), and ``costs.spent(units, sizes)`` is at most
        ``budget``. The model is left as it was, and the same data give the same selection.
        """

    @property
    def allocator(self) -> Allocator:
        """None that could be chosen: the method decides."""
        return OwnSizes()


@dataclass(frozen=True)
class OwnSizes(Allocator):
    """Stands where an allocator does for a method that decides all sizes itself."""

    name: ClassVar[str] = "own"
    summary: ClassVar[str] = "the method decides all sizes itself"
    source: ClassVar[str] = "own"

    @property
    def flags(self) -> str:
        """None: it is not asked for."""
        return "the method"

    def allocate(
        self, units: Sequence[Unit], evidence: Evidence, prices: Prices, keep: float
    ) -> dict[str, int]:
        """Refuse: the sizes come from :meth:`FittedMethod.fit`."""
        raise InputError("the method decides all sizes itself; make the plan with make_plan.")


def fit_within(
    method: FittedMethod,
    model: "Model",
    units: Sequence[Unit],
    prices: Prices,
    budget: int,
    *,
    data: FitData,
) -> tuple[dict[str, int], Selection]:
    """All sizes and the selection that a method is fitted to, held against its contract.

    Raises:
        RunError: they break it: a wrong index, a size that is not allowed, or more than the budget.
    """
    selection = method.fit(model, units, prices, budget, data)
    sizes = {unit.name: unit.size for unit in units} | selection.sizes
    named = {unit.name: unit for unit in units}
    try:
        selection.check(named, sizes)
    except InputError as error:
        raise RunError(f"method {method.name!r} has fitted a wrong selection: {error}") from error
    _check_sizes(method, named, sizes)
    if (spent := prices.spent(units, sizes)) > budget:
        raise RunError(f"method {method.name!r} kept {spent:,}, above its budget of {budget:,}.")
    return sizes, selection


def _check_sizes(method: FittedMethod, units: Mapping[str, Unit], sizes: Mapping[str, int]) -> None:
    for name, unit in units.items():
        if sizes[name] not in unit.sizes():
            raise RunError(
                f"method {method.name!r} gave {name} size {sizes[name]}, which it may not have."
            )
