"""What can shrink: the units of a block, the sizes they may take and what each size costs."""

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

from secateur.structure.form import Cost, Form
from secateur.structure.sites import Site

INDEX_BYTES = 8  # a kept rotary pair is stored as int64
WIDTHS = ("mlp", "query_key", "value_output")
WHOLE_HEADS = ("mlp", "heads")
DEPTH = ("block",)
STREAM = ("residual",)
MATRICES = ("matrix",)
EVERY_BLOCK = -1


@dataclass(frozen=True)
class Unit(ABC):
    """One axis of one module.

    Attributes:
        name: for example ``layers.3.mlp``.
        block: index of its block; EVERY_BLOCK where it runs through all of them.
        size: width today.
        step: sizes other than today's are multiples of this.
        hidden: width of the residual stream.
        least: smallest size; 0 where the unit may go altogether.
        new_bias: whether its reader has no bias today and gets one when it is narrowed.
        caches: whether its block keeps a KV cache, as those that write do.
        stack: name of the encoder or decoder that its block is in; of all blocks one, where only
            one is there.
        part: the part of the block that it is in, as a site's path; empty where it is in none.
        matrices: of the block's matrices the first that it is a side of, and the end of those;
            None stands for all.
    """

    #: short name of the axis, as plans and tables show it
    kind: ClassVar[str]
    #: heading of reports about units of this kind
    title: ClassVar[str]
    #: where the input of what reads the unit is seen, if its size counts channels or heads
    reads: ClassVar[Site | None] = None
    #: kind of the unit in the same part that makes use of it; of no use where that is gone
    serves: ClassVar[str | None] = None

    name: str
    block: int
    size: int
    step: int
    hidden: int
    least: int = field(default=0, kw_only=True)
    new_bias: bool = field(default=False, kw_only=True)
    caches: bool = field(default=True, kw_only=True)
    stack: str = field(default="", kw_only=True)
    part: str = field(default="", kw_only=True)
    matrices: tuple[int, int] | None = field(default=None, kw_only=True)

    @abstractmethod
    def parameters(self, size: int) -> int:
        """Parameters of the unit at ``size``; what no size changes is left out."""

    @abstractmethod
    def matrix_parameters(self, size: int) -> int:
        """The share of :meth:`parameters` that multiplies every token."""

    def cached(self, size: int) -> int:
        """Numbers kept in the KV cache for one token, where there is one."""
        return 0

    def index_bytes(self, size: int) -> int:
        """Bytes of stored indices."""
        return 0

    def beside(self, size: int) -> int:
        """Parameters that shrink along and that no unit counts; of its bytes alone."""
        return 0

    def at_share(self, share: float) -> float:
        """The size, perhaps between two, at which it keeps a share of its price, or nearly so."""
        return share * self.size

    def described(self, size: int) -> str:
        """A size in words, for tables."""
        return str(size)

    def for_runtime(self, grain: int, uneven_heads: bool) -> Self:
        """The unit with those sizes only that a runtime reads; unless redefined, today's alone.

        ``grain``: what widths are multiples of; ``uneven_heads``: whether layers may differ in
        their number of heads.
        """
        return replace(self, least=self.size)

    def _stepping(self, step: int) -> Self:
        """The unit in steps of at least one, never gone altogether."""
        return replace(self, step=step, least=min(self.size, max(self.least, step)))

    @property
    def together(self) -> tuple[int, str]:
        """Units of one group make sense together only: values that go leave queries unread."""
        return self.block, self.part or self.name

    @property
    def fixed(self) -> bool:
        """Whether it has but one size, and is listed for what it costs."""
        return self.least == self.size

    def sizes(self) -> list[int]:
        """All sizes it may take, ascending: multiples of the step, then today's.

        At size 0 the unit is gone; a block whose values are gone has no attention left.
        """
        below = (size for size in range(0, self.size, self.step) if size >= self.least)
        return [*below, self.size]

    def added(self, size: int) -> int:
        """Parameters of a bias that is new at ``size``."""
        return self.hidden if self.new_bias and size < self.size else 0

    def cost(self, size: int, itemsize: int) -> Cost:
        """The price at ``size`` when a stored number takes ``itemsize`` bytes."""
        parameters = self.parameters(size) + self.added(size)
        return Cost(
            parameters=parameters,
            bytes=(parameters + self.beside(size)) * itemsize + self.index_bytes(size),
            flops_per_token=2 * self.matrix_parameters(size),
            cache_bytes_per_token=self.caches * self.cached(size) * itemsize,
        )


@dataclass(frozen=True)
class MLP(Unit):
    """Hidden channels of an MLP; gate and up of a gated one share them."""

    kind: ClassVar[str] = "mlp"
    title: ClassVar[str] = "MLP channels"
    reads: ClassVar[Site | None] = Site("mlp", "hidden")

    producers: int
    biased_producers: int

    def for_runtime(self, grain: int, uneven_heads: bool) -> Self:
        return self._stepping(math.lcm(self.step, grain))

    def matrix_parameters(self, size: int) -> int:
        return size * self.hidden * (self.producers + 1)

    def parameters(self, size: int) -> int:
        return self.matrix_parameters(size) + size * self.biased_producers


@dataclass(frozen=True)
class QueryKey(Unit):
    """Width of queries and keys, the same in all heads of a block."""

    kind: ClassVar[str] = "query_key"
    title: ClassVar[str] = "Query and key width"
    serves: ClassVar[str | None] = "value_output"

    heads: int
    kv_heads: int
    query_bias: bool
    key_bias: bool
    rotary: bool

    def matrix_parameters(self, size: int) -> int:
        return size * self.hidden * (self.heads + self.kv_heads)

    def parameters(self, size: int) -> int:
        biases = self.heads * self.query_bias + self.kv_heads * self.key_bias
        return self.matrix_parameters(size) + size * biases

    def cached(self, size: int) -> int:
        return size * self.kv_heads

    def index_bytes(self, size: int) -> int:
        return INDEX_BYTES * self.kv_heads * (size // 2) if self.rotary and size < self.size else 0


@dataclass(frozen=True)
class ValueOutput(Unit):
    """Rank of a head's value/output map, the same in all heads of a block."""

    kind: ClassVar[str] = "value_output"
    title: ClassVar[str] = "Value width"

    heads: int
    kv_heads: int
    value_bias: bool
    output_bias: bool

    def matrix_parameters(self, size: int) -> int:
        return size * self.hidden * (self.heads + self.kv_heads)

    def parameters(self, size: int) -> int:
        matrices = self.matrix_parameters(size)
        if not self.value_bias:
            return matrices
        if size == self.size:
            return matrices + size * self.kv_heads
        # A narrowed value has no bias: it was folded into the output's, which may be new.
        return matrices + (0 if self.output_bias else self.hidden)

    def cached(self, size: int) -> int:
        return size * self.kv_heads or 1  # the cache counts tokens by what it holds


@dataclass(frozen=True)
class Heads(Unit):
    """KV heads of a block, each with the query heads that read it; they stay or go as a whole."""

    kind: ClassVar[str] = "heads"
    title: ClassVar[str] = "Heads"
    reads: ClassVar[Site | None] = Site("attention", "mixed")

    group: int  #: query heads that read a KV head
    query_key: int
    value: int
    query_bias: bool
    key_bias: bool
    value_bias: bool

    def for_runtime(self, grain: int, uneven_heads: bool) -> Self:
        if not uneven_heads:
            return super().for_runtime(grain, uneven_heads)
        return self._stepping(grain // math.gcd(grain, self.group * self.value))

    def matrix_parameters(self, size: int) -> int:
        return size * self.hidden * (self.group + 1) * (self.query_key + self.value)

    def parameters(self, size: int) -> int:
        queries_and_keys = self.group * self.query_bias + self.key_bias
        biases = self.query_key * queries_and_keys + self.value * self.value_bias
        return self.matrix_parameters(size) + size * biases

    def cached(self, size: int) -> int:
        return size * (self.query_key + self.value) or 1


@dataclass(frozen=True)
class WholeBlock(Unit):
    """A block as a whole, of size 1; it stays or goes.

    Its price is that of its MLP and its heads, so that ``keep`` is a share of the same total for
    every method. Its norms and the biases of what reads an axis go with it uncounted; so a bias
    that takes its place in another block comes uncounted, too.
    """

    kind: ClassVar[str] = "block"
    title: ClassVar[str] = "Whole blocks"

    parts: tuple[Unit, ...]

    def for_runtime(self, grain: int, uneven_heads: bool) -> Self:
        return self

    def matrix_parameters(self, size: int) -> int:
        return size * sum(part.matrix_parameters(part.size) for part in self.parts)

    def parameters(self, size: int) -> int:
        return size * sum(part.parameters(part.size) for part in self.parts)

    def added(self, size: int) -> int:
        return 0

    def cached(self, size: int) -> int:
        return size * sum(part.cached(part.size) for part in self.parts)


@dataclass(frozen=True)
class Residual(Unit):
    """Width of the residual stream, one for the whole model.

    Counted are the MLPs and heads of all blocks, as for every other method, and the shortcuts that
    a narrower stream needs, two matrices a block. They make sizes just below today's cost more than
    today's.
    """

    kind: ClassVar[str] = "residual"
    title: ClassVar[str] = "Residual stream"

    parts: tuple[Unit, ...]  #: MLP and heads of every block
    shortcuts: int
    norms: int  #: norms over the stream
    biases: int  #: biases added to it
    embeddings: int  #: rows of the embedding and, where it is another matrix, of the head
    tied: int  #: rows of a head that is the embedding today and can't stay so

    def for_runtime(self, grain: int, uneven_heads: bool) -> Self:
        return self

    def matrix_parameters(self, size: int) -> int:
        whole = sum(part.matrix_parameters(part.size) for part in self.parts)
        matrices = whole // self.size * size
        return matrices + (self.shortcuts * size**2 if size < self.size else 0)

    def parameters(self, size: int) -> int:
        whole = sum(part.parameters(part.size) for part in self.parts)
        rest = whole - self.matrix_parameters(self.size)  # biases of what reads the stream
        return self.matrix_parameters(size) + rest

    def cached(self, size: int) -> int:
        return sum(part.cached(part.size) for part in self.parts)

    def beside(self, size: int) -> int:
        rows = self.norms + self.biases + self.embeddings
        return size * (rows + (self.tied if size < self.size else 0))


@dataclass(frozen=True)
class Matrix(Unit):
    """The weight of one linear layer, dense or in one of several other forms.

    Several layers that read the same may be one matrix, their weights one below the other.
    Its size counts the forms, from 1 for the cheapest on; the largest is the dense weight.
    """

    kind: ClassVar[str] = "matrix"
    title: ClassVar[str] = "Matrices"

    paths: tuple[str, ...]  #: of the linear in its block, or of several that share a form
    outputs: int
    inputs: int
    forms: tuple[Form, ...]  #: those that are smaller than the dense weight, ascending
    order: int  #: of its first part among all matrices of the block
    published: bool  #: whether a checkpoint of the stock class has this very matrix
    itemsize: int = 2  #: bytes of a stored number, by which its forms are in order

    def for_runtime(self, grain: int, uneven_heads: bool) -> Self:
        return self

    def at(self, size: int) -> Form | None:
        """The form of a size; None where it is dense."""
        return self.forms[size - 1] if size < self.size else None

    def matrix_parameters(self, size: int) -> int:
        form = self.at(size)
        return self.outputs * self.inputs if form is None else form.multiplications

    def parameters(self, size: int) -> int:
        form = self.at(size)
        return self.outputs * self.inputs if form is None else form.parameters

    def cost(self, size: int, itemsize: int) -> Cost:
        form = self.at(size)
        whole = self.outputs * self.inputs
        return Cost(
            parameters=self.parameters(size),
            bytes=whole * itemsize if form is None else form.bytes(itemsize),
            flops_per_token=2 * self.matrix_parameters(size),
            cache_bytes_per_token=0,
        )

    def at_share(self, share: float) -> float:
        """By bytes."""
        whole = self.outputs * self.inputs * self.itemsize
        prices = [form.bytes(self.itemsize) for form in self.forms] + [whole]
        index = bisect_right(prices, share * whole)
        if index in (0, len(prices)):
            return float(max(1, index))
        low, high = prices[index - 1], prices[index]
        return index + (share * whole - low) / (high - low)

    def described(self, size: int) -> str:
        form = self.at(size)
        return "dense" if form is None else form.label


KINDS: Mapping[str, type[Unit]] = {
    unit.kind: unit for unit in (MLP, QueryKey, ValueOutput, Heads, WholeBlock, Residual, Matrix)
}
#: where the input of what reads a unit is seen, for every kind that counts channels or heads
READS: Mapping[str, Site] = {
    kind: unit.reads for kind, unit in KINDS.items() if unit.reads is not None
}


def unread(units: Sequence[Unit], sizes: Mapping[str, int]) -> set[str]:
    """Names of the units that are of no use at these sizes, as what makes use of them is gone."""
    gone = {(unit.block, unit.part, unit.kind) for unit in units if not sizes[unit.name]}
    return {u.name for u in units if (u.block, u.part, u.serves) in gone}
