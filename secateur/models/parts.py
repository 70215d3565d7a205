"""What a block is made of: its parts, and what the units of each part can have done to them.

A :class:`Part` is a mixer (attention) or a feed-forward (an MLP). It knows its linear layers and
where in it activations are seen. A :class:`View` is what one kind of unit means in a live part: the
unit as data, the weights that methods read, and the surgery that makes it smaller. A new kind of
unit is a class in ``structure/units.py`` and a view here.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from secateur.structure.narrowing import Narrowing
from secateur.structure.sites import Site, part_name
from secateur.structure.units import READS, Unit

if TYPE_CHECKING:
    from secateur.models.block import Block

Give = Callable[..., None]  #: is given the activations of a site, (batch, tokens, …) each


class Handle(Protocol):
    """A hook that is in place."""

    def remove(self) -> None:
        """Take it out."""


class LinearPath(NamedTuple):
    """A linear layer of a part, or several matrices in one.

    Attributes:
        path: where it is in the block.
        side: where what it reads is seen, see :class:`~secateur.structure.sites.Site`.
        matrices: how many equal parts its outputs have.
        stock: whether the stock class has this very matrix under this name.
    """

    path: str
    side: str
    matrices: int
    stock: bool


class Part(ABC):
    """A mixer or a feed-forward of a block.

    Attributes:
        block: the block that it is in.
        name: "attention" or "mlp"; with a number from the second of its kind on.
        views: what units of each kind mean in it, by kind, in the order of the units.
    """

    role: ClassVar[str]

    def __init__(self, block: "Block", number: int) -> None:
        self.block = block
        self.name = part_name(self.role, number)
        self.views: dict[str, View] = {}

    @property
    @abstractmethod
    def outputs(self) -> int:
        """Width of what it adds to the residual stream."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where its weights are, if they are in memory."""

    @property
    @abstractmethod
    def linear_paths(self) -> list[LinearPath]:
        """Its linear layers, in order."""

    @property
    @abstractmethod
    def matrices(self) -> list[Tensor]:
        """The weights of its linear layers, each matrix by itself, either way round."""

    @abstractmethod
    def features(self, side: str) -> tuple[int, ...] | None:
        """What a token has at a side of it, or None where nothing is seen there.

        Of statistics of gradients ("FUNCTIONAL:KIND") the number of channels or KV heads.
        """

    @abstractmethod
    def watch(
        self, side: str, give: Give, shape: Sequence[int], wanted: Callable[[], bool]
    ) -> Handle:
        """Give the activations of a side, for inputs of a shape (batch, tokens), to a function.

        ``wanted`` says whether activations that are expensive to make are still of use.
        """

    @abstractmethod
    def kept(self) -> AbstractContextManager[None]:
        """While this lasts its weights may change; then it has every bit back."""

    def axis(self, kind: str) -> "AxisView":
        """The view of the channels or KV heads in it."""
        found = self.views[kind]
        assert isinstance(found, AxisView)
        return found

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """Some of its matrices, counted through all matrices of the block."""
        others = self.block.parts
        before = others[: others.index(self)]
        first = sum(path.matrices for part in before for path in part.linear_paths)
        return first + start, first + stop

    def site(self, side: str) -> Site:
        """A site of this part."""
        return Site(self.name, side)

    def notes(self, kinds: Sequence[str]) -> list[str]:
        """What people should know about units of some kinds here, beside obstacles."""
        return []


class View(ABC):
    """What a unit of one kind is in a block whose weights are in memory.

    Use :meth:`Block.view` to get the view of a unit; it is cheap to make, and holds no weights.
    """

    kind: ClassVar[str]

    @abstractmethod
    def unit(self, multiple_of: int, biased: bool) -> Unit | None:
        """The unit as data; None where the block has none of this kind.

        ``biased``: what reads the unit gets a bias when it is narrowed.
        """

    @abstractmethod
    def narrow(self, narrowing: Narrowing) -> None:
        """Make the unit smaller, in place."""

    @abstractmethod
    def kept(self) -> AbstractContextManager[None]:
        """While this lasts the unit may be narrowed; then the block has every bit back."""

    def arbitrary(self, size: int) -> Narrowing:
        """Any narrowing to a size: how long a product takes does not depend on its numbers."""
        raise AssertionError(f"no {self.kind} is timed")

    @property
    def obstacle(self) -> str | None:
        """Why units of this kind must stay as they are here, or None."""
        return None


class AxisView(View):
    """A unit whose size counts things with coordinates of their own: channels, or KV heads.

    What a method needs of such a unit: what reads it (:meth:`read`), where that is seen
    (:attr:`site`), and all parameters that go with each of the things (:meth:`parameters`).
    """

    def __init__(self, part: Part) -> None:
        self.part = part

    @property
    def site(self) -> Site:
        """Where the input of what reads the unit is seen."""
        return self.part.site(READS[self.kind].side)

    @abstractmethod
    def read(self) -> Tensor:
        """What reads it, as (its size, coordinates of each, outputs), float64."""

    @property
    def constant(self) -> Tensor | None:
        """What biases add to the input of what reads it, and statistics leave out; or None."""
        return None

    @abstractmethod
    def parameters(
        self, of: Callable[[Tensor], Tensor] = lambda parameter: parameter
    ) -> list[Tensor]:
        """Every parameter that goes with each of its things: (size, …) views, in one order.

        ``of`` puts something of the same shape, its gradient for one, in the place of each.
        """

    def kept(self) -> AbstractContextManager[None]:
        return self.part.kept()


def by_kind(views: Sequence[View]) -> Mapping[str, View]:
    """Views by the kind of their unit."""
    return {view.kind: view for view in views}


def numbered(paths: Sequence[LinearPath]) -> Iterator[tuple[int, LinearPath]]:
    """Linear layers with the number of their first matrix."""
    order = 0
    for path in paths:
        yield order, path
        order += path.matrices


def entering(give: Give, shape: Sequence[int]) -> Callable[[nn.Module, Any], None]:
    """A hook that gives what a module reads."""
    return lambda _, args: give(args[0].reshape(*shape, -1))
