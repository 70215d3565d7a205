"""The contract of a method: score an axis, and say what replaces it at a size."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import Tensor

from secateur.calibration.needs import BlockStatistics, Need
from secateur.calibration.token_batches import TokenBatches
from secateur.models.block import Block
from secateur.structure.budget import Keep, Target
from secateur.structure.error_curve import Curve
from secateur.structure.narrowing import Narrowing
from secateur.structure.units import WIDTHS, Unit
from secateur.utils.errors import InputError
from secateur.utils.options import checked

if TYPE_CHECKING:
    from secateur.allocate.base import Allocator
    from secateur.models.model import Model


class Solution:
    """How a method compresses one unit, for each size that the unit can take.

    ``at`` says what replaces the unit at a size. The curve may be given as what works it out, where
    that is dear: it is done when someone asks, and applying a plan never does. ``keeping`` says
    what replaces the unit where given coordinates stay, with all that the method refits; ``at``
    then is that of the coordinates that the method chooses.
    """

    def __init__(
        self,
        curve: Curve | Callable[[], Curve],
        at: Callable[[int], Narrowing],
        keeping: Callable[[Tensor], Narrowing] | None = None,
    ) -> None:
        self._curve = curve
        self.at = at
        self._keeping = keeping

    @classmethod
    def of(
        cls,
        curve: Curve | Callable[[], Curve],
        choose: Callable[[int], Tensor],
        keeping: Callable[[Tensor], Narrowing],
    ) -> "Solution":
        """The solution of a method that chooses coordinates and then fits what is left to them."""
        return cls(curve, lambda size: keeping(choose(size)), keeping)

    def keeping(self, keep: Tensor) -> Narrowing:
        """What replaces the unit where given coordinates stay, as ``Narrowing.keep`` has them.

        Raises:
            InputError: the method can't be told which stay, or they are no coordinates of the unit.
        """
        if self._keeping is None:
            raise InputError("this method can't be told which coordinates of a unit stay.")
        return self._keeping(keep)

    @cached_property
    def curve(self) -> Curve:
        """Predicted error of the unit's output, or what else :attr:`Method.curve` says."""
        return self._curve if isinstance(self._curve, Curve) else self._curve()


@dataclass(frozen=True)
class Method(ABC):
    """A compression method. Its fields are its whole configuration and are checked on creation.

    Command-line flags and Python arguments come from the same fields, so they cannot differ.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    #: what the curve of a unit says, after a title for a column
    curve: ClassVar[str] = "predicted error: share of the unit's own output that is lost"
    #: the axes that it narrows
    kinds: ClassVar[tuple[str, ...]] = WIDTHS
    #: the axes that stay whole, and that a budget counts all the same: a share means one thing
    spared: ClassVar[tuple[str, ...]] = ()
    #: the axes of which it keeps coordinates as they are, and can be told which: their solutions
    #: have ``keeping``
    selects: ClassVar[tuple[str, ...]] = ()
    #: what a budget counts unless something else is asked for
    target: ClassVar[Target] = "parameters"
    #: whether a block's statistics are read once more, behind the narrowed blocks before it
    rereads: ClassVar[bool] = False
    #: what a budget keeps unless something else is asked for
    usual_keep: ClassVar[Keep] = 0.8

    def __post_init__(self) -> None:
        checked(self)

    def __new__(cls, *given: Any, **options: Any) -> Self:
        """Options are given by name, and what is kept is no option of a method.

        Raises:
            InputError: it is given here, or an option without its name.
        """
        if "keep" in options:
            raise InputError(
                f"{cls.__name__}(keep={options['keep']!r}): what is kept belongs to the budget; "
                f"write compress(source, out, {cls.__name__}(), Budget(keep={options['keep']!r}))."
            )
        if given:
            raise InputError(f"{cls.__name__}: give its options by name; `secateur ls` lists them.")
        return super().__new__(cls)

    @property
    @abstractmethod
    def needs(self) -> frozenset[Need]:
        """The statistics that :meth:`solve` reads; a class variable unless options say which."""

    @property
    @abstractmethod
    def allocator(self) -> "Allocator":
        """What spends the budget when nothing else is asked for."""

    @property
    def final(self) -> bool:
        """Whether no method can go on from what it leaves and keep it."""
        return False

    @property
    def biased(self) -> bool:
        """Whether narrowing makes up for what is gone by a bias."""
        return False

    def units(self, model: "Model", multiple_of: int) -> list[Unit]:
        """All axes of a model that count, block by block; those that it spares have one size."""
        found = model.units(multiple_of, (*self.kinds, *self.spared), self.biased)
        return [replace(u, least=u.size) if u.kind in self.spared else u for u in found]

    def obstacle(self, model: "Model") -> str | None:
        """Why it can change nothing in a model, or None."""
        if model.narrowed:
            return (
                "it is already compressed, and only methods that keep widths can go on from there; "
                "start from the original model instead"
            )
        if any(not unit.fixed for unit in self.units(model, 1)):
            return None
        return "; ".join(model.obstacles_of(self.kinds))

    @abstractmethod
    def solve(self, unit: Unit, block: Block, statistics: BlockStatistics) -> Solution:
        """The unit at every size; touches no weight.

        A unit that runs through all blocks is solved once a place, whose statistic comes alone.
        """


class SequentialMethod(Method):
    """A method that refits each block to correct errors of the compressed blocks before it.

    When weights are changed, :meth:`solve` is given, besides the method's own statistics of the
    dense model, those of the narrowed model so far with what the block should make of them:
    MIXED_GRAM and MIXED_TARGET for value/output, HIDDEN_GRAM and HIDDEN_TARGET for an MLP. Sizes
    then include today's, at which only a consumer may change.
    """

    @abstractmethod
    def refine(self, block: Block, rows: TokenBatches) -> None:
        """Adjust a narrowed MLP, in place, after its consumer was refitted.

        ``rows`` are what its producers read and what its consumer should give, without bias. On
        several ranks all call this, and what the first one makes of the weights is for all.
        """
