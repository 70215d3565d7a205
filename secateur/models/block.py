"""One transformer block, with weights that mean the same in every family."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from secateur.families import Anatomy, HeadLayout
from secateur.layers.factored_secateur import LowRank
from secateur.models.attention import Attention
from secateur.models.feed_forward import DenseMLP
from secateur.models.linear_ops import inputs_by_outputs, sizes_of
from secateur.models.parts import AxisView, Part, View, numbered
from secateur.structure.narrowing import Narrowing
from secateur.structure.sites import BLOCK, Site
from secateur.structure.units import WHOLE_HEADS, WIDTHS, Matrix, Unit, WholeBlock
from secateur.utils.errors import InputError
from secateur.utils.precision import exact_device

Kind = TypeVar("Kind", bound=Part)


class Linear(NamedTuple):
    """A linear layer of a block.

    Attributes:
        path: where it is in the block.
        module: the layer.
        site: where what it reads is seen.
        behind: another linear, through which that passes first; None where it reads it as it is.
        factor: whether it is one of two that stand for one matrix.
        order: of its first matrix among the block's :attr:`Block.matrices`.
        published: whether the stock class has this very matrix under this name.
    """

    path: str
    module: nn.Module
    site: Site
    behind: nn.Module | None
    factor: bool
    order: int
    published: bool


@dataclass
class Block:
    """One transformer block: its module, and the parts whose weights its units couple.

    Attributes:
        index: counts through the decoder where one stands behind an encoder.
        module: the block in the transformers model. Creating a Block replaces its attention, see
            :class:`~secateur.models.attention.Attention`.
        anatomy: its family.
        layout: how the heads lie in the family's own attention.
        mixers: what passes between tokens: its attention, or nothing.
        feed_forwards: its MLPs.
        stock_linears: the sizes that the MLPs' linears had when the model was opened.
        gone: whether it hands on what it gets.
    """

    index: int
    module: nn.Module
    anatomy: Anatomy
    layout: HeadLayout
    mixers: list[Attention] = field(init=False)
    feed_forwards: list[DenseMLP] = field(init=False)
    stock_linears: dict[str, dict[str, Any]] = field(init=False)
    gone: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.mixers = [] if self.anatomy.attention is None else [Attention(self, 0, self.layout)]
        mlps = enumerate(self.anatomy.feed_forwards)
        self.feed_forwards = [DenseMLP(self, number, paths) for number, paths in mlps]
        self.stock_linears = self.linears

    @property
    def parts(self) -> list[Part]:
        """Its mixers, then its feed-forwards."""
        return [*self.mixers, *self.feed_forwards]

    def part(self, name: str) -> Part:
        """A part by its name."""
        return next(part for part in self.parts if part.name == name)

    @property
    def attention(self) -> Attention:
        """Its attention, for what is defined for blocks of one attention and one MLP only.

        Raises:
            InputError: it has none, or several.
        """
        return self._only(self.mixers, "attention")

    @property
    def mlp(self) -> DenseMLP:
        """Its MLP, for what is defined for blocks of one attention and one MLP only.

        Raises:
            InputError: it has none, or several.
        """
        return self._only(self.feed_forwards, "MLP")

    def _only(self, parts: list[Kind], what: str) -> Kind:
        if len(parts) != 1:
            raise InputError(
                f"block {self.index} has {len(parts)} of what should be one {what} here; blocks of "
                f"the family {self.anatomy.family} can be pruned, but not this."
            )
        return parts[0]

    @property
    def one_of_each(self) -> bool:
        """Whether it is one attention and one MLP."""
        return len(self.mixers) == len(self.feed_forwards) == 1

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.parts[0].outputs

    @property
    def device(self) -> torch.device:
        """Where its weights are, if they are in memory."""
        return self.parts[0].device

    def remove(self, constant: Tensor | None = None) -> None:
        """Hand on what comes in, plus a constant; :meth:`put_back` undoes it."""

        def passed(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
            if constant is not None:
                hidden_states = hidden_states + constant.to(hidden_states)
            return as_output(hidden_states, self.anatomy)

        self.gone, self.module.forward = True, passed

    def put_back(self) -> None:
        """Compute again."""
        if self.gone:
            self.gone = False
            del self.module.forward

    @contextmanager
    def solving(self) -> Iterator[None]:
        """While this lasts, its weights are where float64 is, for methods to read.

        Where that is another device they are copies: nothing may change them.
        """
        home = exact_device(self.device)
        if home == self.device:
            yield
            return
        own: list[tuple[dict[str, Any], str, Tensor]] = [
            (entries, name, tensor)
            for module in self.module.modules()
            for entries in (module._parameters, module._buffers)
            for name, tensor in entries.items()
            if tensor is not None
        ]
        try:
            for entries, name, tensor in own:
                copy = tensor.detach().to(home)
                computes = isinstance(tensor, nn.Parameter)
                entries[name] = nn.Parameter(copy, requires_grad=False) if computes else copy
            yield
        finally:
            for entries, name, tensor in own:
                entries[name] = tensor

    @property
    def linears(self) -> dict[str, dict[str, Any]]:
        """Path of each of the MLPs' linears to its sizes, as a checkpoint has them."""
        paths = [linear.path for mlp in self.feed_forwards for linear in mlp.linear_paths]
        return {path: sizes_of(self.module.get_submodule(path)) for path in paths}

    @property
    def linear_layers(self) -> list[Linear]:
        """All its linear layers that are not empty, the factors of one in two each by itself."""
        found = []
        sites = [(path, p.site(path.side)) for p in self.parts for path in p.linear_paths]
        for (order, linear), (_, site) in zip(numbered([p for p, _ in sites]), sites, strict=True):
            path, layer = linear.path, self.module.get_submodule(linear.path)
            if isinstance(layer, LowRank):
                for name, behind in (("first", None), ("second", layer.first)):
                    factor = layer.get_submodule(name)
                    found.append(
                        Linear(
                            f"{path}.{name}",
                            factor,
                            site,
                            behind,
                            True,
                            order=order,
                            published=False,
                        )
                    )
            elif isinstance(layer, nn.Linear | Conv1D) and layer.weight.numel():
                found.append(
                    Linear(path, layer, site, None, False, order=order, published=linear.stock)
                )
        return found

    @property
    def matrices(self) -> list[Tensor]:
        """The weights of all its linear layers, each matrix by itself, attention's first."""
        return [matrix for part in self.parts for matrix in part.matrices]

    def add_constant(self, constant: Tensor) -> None:
        """Add to the bias of the last consumer, which is new where there was none.

        Raises:
            InputError: the sum is not finite in the weights' number format.
        """
        mlp = self.feed_forwards[-1]
        mlp.set_consumer_weight(inputs_by_outputs(mlp.consumer), constant)
        bias = mlp.consumer.bias
        assert isinstance(bias, Tensor)
        if not bool(torch.isfinite(bias).all()):
            raise InputError(
                f"block {self.index}: the constant of what goes behind it is NaN or infinite as "
                f"{bias.dtype}; try --dtype float32, or leave constants out (--compensate 0)."
            )

    @property
    def sums(self) -> bool:
        """Whether a constant in the last consumer's output reaches the stream.

        It does where no norm stands behind.
        """
        attribute = self.anatomy.norms_first
        if attribute is not None and not getattr(self.module, attribute):
            return False
        return bool(self.feed_forwards) and not self.anatomy.norms_behind

    def sites(self, site: Site) -> list[Site]:
        """Where the activations of a site are seen in this block: in every such part."""
        if site.path == BLOCK:
            return [site] if site.side != "between" or self.anatomy.pre_norm is not None else []
        parts = [part for part in self.parts if part.role == site.path]
        there = [part.site(site.side) for part in parts if part.features(site.side) is not None]
        read = {linear.site for linear in self.linear_layers}
        linears = {path.side for part in parts for path in part.linear_paths}
        return [
            s for s in there if s.side not in linears or s in read
        ]  # what is empty reads nothing

    def features(self, site: Site) -> tuple[int, ...]:
        """What a token has at a site of this block."""
        if site.path == BLOCK:
            return (self.hidden,)
        found = self.part(site.path).features(site.side)
        assert found is not None
        return found

    @property
    def views(self) -> list[View]:
        """What its units are, in the order of the units."""
        parts: list[Part] = [*self.feed_forwards, *self.mixers]
        return [*(view for part in parts for view in part.views.values()), BlockView(self)]

    def view(self, unit: Unit) -> View:
        """What a unit of this block is in it."""
        if isinstance(unit, Matrix):
            return MatrixView(self, unit)
        return self.part(unit.part).views[unit.kind] if unit.part else BlockView(self)

    def axis(self, unit: Unit) -> AxisView:
        """The view of a unit whose size counts channels or KV heads."""
        found = self.view(unit)
        assert isinstance(found, AxisView)
        return found

    def mlp_of(self, unit: Unit) -> DenseMLP:
        """The MLP that a unit is in."""
        found = self.part(unit.part)
        assert isinstance(found, DenseMLP)
        return found

    def attention_of(self, unit: Unit) -> Attention:
        """The attention that a unit is in."""
        found = self.part(unit.part)
        assert isinstance(found, Attention)
        return found

    def units(
        self, multiple_of: int, kinds: Sequence[str] = WIDTHS, biased: bool = False
    ) -> list[Unit]:
        """The units of some kinds; MLP widths go in multiples of ``multiple_of``.

        ``biased``: narrowing gives a bias to whatever reads the unit.
        """
        made = (v.unit(multiple_of, biased) for v in self.views if v.kind in kinds)
        caches = self.anatomy.use == "causal" or self.anatomy.crossing is not None
        return [
            replace(unit, caches=caches, stack=self.anatomy.blocks)
            for unit in made
            if unit is not None
        ]


class BlockView(View):
    """A block as a whole."""

    kind = "block"

    def __init__(self, block: Block) -> None:
        self.block = block

    def unit(self, multiple_of: int, biased: bool) -> WholeBlock:
        block = self.block
        parts = block.units(multiple_of, WHOLE_HEADS, biased)
        ends = block.feed_forwards[-1].consumer.bias is None if block.feed_forwards else False
        return WholeBlock(
            name=f"layers.{block.index}.block",
            block=block.index,
            size=1,
            step=1,
            hidden=block.hidden,
            least=0 if self.obstacle is None else 1,
            parts=tuple(parts),
            # the block before it takes the constant that stands for it
            new_bias=biased and block.index > 0 and block.sums and ends,
        )

    @property
    def obstacle(self) -> str | None:
        if not self.block.anatomy.position_bias:
            return None
        return "whole blocks stay: the first one of a stack makes the position bias of the others"

    def narrow(self, narrowing: Narrowing) -> None:
        """Let the block hand on what it gets, and a constant for what is gone."""
        self.block.remove(narrowing.bias)

    @contextmanager
    def kept(self) -> Iterator[None]:
        try:
            yield
        finally:
            self.block.put_back()

    def arbitrary(self, size: int) -> Narrowing:
        return Narrowing()


class MatrixView(View):
    """The weight of a linear layer, or of several that share a form."""

    kind = "matrix"

    def __init__(self, block: Block, matrix: Matrix) -> None:
        self.block, self.matrix = block, matrix

    def unit(self, multiple_of: int, biased: bool) -> Matrix:
        return self.matrix

    def narrow(self, narrowing: Narrowing) -> None:
        """Put layers of other forms in the place of the linear ones."""
        for path, layer in narrowing.layers.items():
            self.block.module.set_submodule(path, layer)

    @contextmanager
    def kept(self) -> Iterator[None]:
        module = self.block.module
        layers = {path: module.get_submodule(path) for path in self.matrix.paths}
        try:
            yield
        finally:
            for path, layer in layers.items():
                module.set_submodule(path, layer)


def as_output(hidden_states: Tensor, anatomy: Anatomy, beside: Sequence[Any] | None = None) -> Any:
    """Hidden states as a block gives them, with ``beside`` or nothing for what else it gives."""
    if anatomy.outputs == 1:
        return hidden_states
    return (hidden_states, *(beside or [None] * (anatomy.outputs - 1)))
