"""One transformer block, with weights that mean the same in every family."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from secateur.families import Anatomy, HeadLayout
from secateur.layers.attention_secateur import NarrowAttention
from secateur.layers.factored_secateur import LowRank
from secateur.models.canonical_attention import uniform_attention
from secateur.models.linear_ops import (
    dense_weight,
    inputs_by_outputs,
    may_be_empty,
    set_linear,
    sizes_of,
    with_constant,
)
from secateur.structure.units import MLP, WIDTHS, Heads, QueryKey, Unit, ValueOutput, WholeBlock
from secateur.utils.errors import InputError
from secateur.utils.precision import exact, exact_device


class Linear(NamedTuple):
    """A linear layer of a block.

    Attributes:
        path: where it is in the block.
        module: the layer.
        place: where a :class:`~secateur.calibration.statistics.Need` finds what it reads.
        behind: another linear, through which that passes first; None where it reads it as it is.
        factor: whether it is one of two that stand for one matrix.
        order: of its first part among the block's :meth:`Block.matrices`, attention's first.
        published: whether the stock class has this very matrix under this name.
    """

    path: str
    module: nn.Module
    place: str
    behind: nn.Module | None
    factor: bool
    order: int
    published: bool


@dataclass
class Block:
    """One transformer block: its module and the weights that its units couple.

    ``index`` counts through the decoder where one stands behind an encoder. Creating it replaces
    the block's attention by a :class:`NarrowAttention` of full width with the same weights, so that
    statistics and narrowing meet one kind of attention everywhere. ``stock_attention`` keeps the
    replaced module, which shares its weights where it can, and ``stock_linears`` the sizes of the
    MLP's linears. In a checkpoint that is compressed already both are what they are there. A block
    that is ``gone`` hands on what it gets.
    """

    index: int
    module: nn.Module
    anatomy: Anatomy
    heads: HeadLayout
    attention: NarrowAttention = field(init=False)
    stock_attention: nn.Module = field(init=False)
    stock_linears: dict[str, dict[str, Any]] = field(init=False)
    gone: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.stock_attention = self.module.get_submodule(self.anatomy.attention)
        if isinstance(self.stock_attention, NarrowAttention):  # of a compressed checkpoint
            self.attention = self.stock_attention
        else:
            attention = uniform_attention(self.stock_attention, self.anatomy, self.heads)
            self.replace_attention(attention)
        for path in (*(path for path, _ in self.anatomy.producers), self.anatomy.consumer):
            self.module.set_submodule(path, may_be_empty(self.module.get_submodule(path)))
        self.stock_linears = self.linears

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

    @property
    def device(self) -> torch.device:
        """Where its weights are, if they are in memory."""
        return self.attention.o_proj.weight.device

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
        """Path of each of the MLP's linears to its sizes, as a checkpoint has them."""
        paths = [path for path, _ in self.anatomy.producers] + [self.anatomy.consumer]
        return {path: sizes_of(self.module.get_submodule(path)) for path in paths}

    @property
    def linear_layers(self) -> list[Linear]:
        """All its linear layers that are not empty, the factors of one in two each by itself."""
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        at = {f"{self.anatomy.attention}.{name}": "attention_inputs" for name in names}
        at[f"{self.anatomy.attention}.o_proj"] = "output_inputs"
        at |= {path: "mlp_inputs" for path, _ in self.anatomy.producers}
        at[self.anatomy.consumer] = "hidden"
        found, order, parts = [], 0, dict(self.anatomy.producers)
        for path, place in at.items():
            here, order = order, order + parts.get(path, 1)
            layer, name = self.module.get_submodule(path), path.rpartition(".")[2]
            stock = place in ("mlp_inputs", "hidden") or self.published(name)
            if isinstance(layer, LowRank):
                first, second = layer.first, layer.second
                found.append(Linear(f"{path}.first", first, place, None, True, here, False))
                found.append(Linear(f"{path}.second", second, place, first, True, here, False))
            elif isinstance(layer, nn.Linear | Conv1D) and layer.weight.numel():
                found.append(Linear(path, layer, place, None, False, here, stock))
        return found

    def published(self, name: str) -> bool:
        """Whether the stock attention has this linear of the block's, dims in the same order."""
        there = isinstance(getattr(self.stock_attention, name, None), nn.Linear)
        return there and self.heads.pairs == sorted(self.heads.pairs)

    def replace_attention(self, attention: NarrowAttention) -> None:
        """Put another attention in the block."""
        self.attention = attention
        self.module.set_submodule(self.anatomy.attention, attention)

    @property
    def producers(self) -> list[tuple[nn.Module, int]]:
        """The linears that make the MLP's hidden channels, with their number of equal parts."""
        return [(self.module.get_submodule(path), n) for path, n in self.anatomy.producers]

    @property
    def producer_weights(self) -> list[Tensor]:
        """The producers' weights part by part, the gate first: views of (inputs, channels)."""
        return [
            part
            for producer, parts in self.producers
            for part in inputs_by_outputs(producer).chunk(parts, 1)
        ]

    def produced(self, inputs: Tensor) -> list[Tensor]:
        """What the producers make of (tokens, inputs), part by part: (tokens, channels)."""
        return [
            part for module, parts in self.producers for part in module(inputs).chunk(parts, -1)
        ]

    def channels(self, produced: list[Tensor]) -> Tensor:
        """The MLP's hidden channels from what the producers made, channel by channel."""
        activation = self.module.get_submodule(self.anatomy.activation)
        hidden: Tensor = activation(produced[0])
        return hidden * produced[1] if len(produced) == 2 else hidden

    @property
    def consumer(self) -> nn.Module:
        """The linear that reads the MLP's hidden channels."""
        return self.module.get_submodule(self.anatomy.consumer)

    @property
    def consumer_weight(self) -> Tensor:
        """The consumer's weight as (hidden channels, outputs), float64."""
        return exact(inputs_by_outputs(self.consumer))

    def set_consumer_weight(self, rows: Tensor, bias: Tensor | None = None) -> None:
        """Give the consumer another weight, (channels, outputs), and add to its bias."""
        consumer: Any = self.consumer
        like = inputs_by_outputs(consumer)
        rows = rows.t().to(like).contiguous()
        set_linear(consumer, rows, with_constant(consumer.bias, bias, like))

    def add_constant(self, constant: Tensor) -> None:
        """Add to the consumer's bias, which is new where there was none.

        Raises:
            InputError: the sum is not finite in the weights' number format.
        """
        self.set_consumer_weight(inputs_by_outputs(self.consumer), constant)
        bias = self.consumer.bias
        assert isinstance(bias, Tensor)
        if not bool(torch.isfinite(bias).all()):
            raise InputError(
                f"block {self.index}: the constant of what goes behind it is NaN or infinite as "
                f"{bias.dtype}; try --dtype float32, or leave constants out (--compensate 0)."
            )

    @property
    def sums(self) -> bool:
        """Whether a constant in the consumer's output reaches the stream: no norm stands behind."""
        attribute = self.anatomy.norms_first
        if attribute is not None and not getattr(self.module, attribute):
            return False
        return not self.anatomy.norms_behind

    def features(self, place: str) -> tuple[int, ...]:
        """What a token has at a place of a :class:`~secateur.calibration.statistics.Need`.

        Of statistics of gradients, how many channels or KV heads there are.
        """
        attention = self.attention
        stream = (attention.o_proj.out_features,)
        query_key = attention.kv_heads, attention.query_key
        mixed = (attention.heads * attention.value,)
        channels = (inputs_by_outputs(self.consumer).shape[0],)
        found = {
            **{"hidden": channels, "mlp": channels, "heads": (attention.kv_heads,)},
            **{"query": (attention.heads, attention.query_key), "key": query_key},
            **{"value": (attention.kv_heads, attention.value), "scores": query_key},
            **{"mixed": mixed, "output_inputs": mixed, "block": stream, "between": stream},
            **{"behind": stream, "attention_inputs": stream, "mlp_inputs": stream},
        }
        return found[place.rpartition(":")[2]]

    @property
    def output_rows(self) -> Tensor:
        """The output projection's weight as (heads, value width, hidden), float64."""
        attention = self.attention
        weight = exact(attention.o_proj.weight).t()
        rows: Tensor = weight.unflatten(0, (attention.heads, attention.value))
        return rows

    def read(self, kind: str) -> Tensor:
        """What reads an axis, as (its size, coordinates of each, outputs), float64.

        The coordinates of a KV head are those of all query heads that read it.
        """
        if kind == "mlp":
            return self.consumer_weight.unsqueeze(1)
        rows: Tensor = self.output_rows.unflatten(0, (self.attention.kv_heads, -1)).flatten(1, 2)
        return rows

    def parameters_of(
        self, kind: str, of: Callable[[Tensor], Tensor] = lambda parameter: parameter
    ) -> list[Tensor]:
        """Every parameter that goes with a channel or a KV head: (size, …) views, in one order.

        ``of`` puts something of the same shape, its gradient for one, in the place of each.
        """
        if kind == "mlp":

            def inputs_first(module: nn.Module) -> Tensor:
                assert isinstance(module.weight, Tensor)
                weight = of(module.weight)
                return weight.t() if isinstance(module, nn.Linear) else weight

            found = [
                part.t()
                for module, n in self.producers
                for part in inputs_first(module).chunk(n, 1)
            ]
            for module, n in self.producers:
                if isinstance(module.bias, Tensor):
                    found += of(module.bias).unsqueeze(1).chunk(n)
            return [*found, inputs_first(self.consumer)]
        attention = self.attention
        maps = (attention.q_proj, attention.k_proj, attention.v_proj)
        parts = [of(t) for m in maps for t in (m.weight, m.bias) if t is not None]
        parts.append(of(attention.o_proj.weight).t())
        return [part.unflatten(0, (attention.kv_heads, -1)) for part in parts]

    def matrices(self, kind: str) -> list[Tensor]:
        """The matrices that an axis is a side of, or of whose heads it is, either way round."""
        if kind == "mlp":
            producers = [part for m, n in self.producers for part in dense_weight(m).chunk(n)]
            return [*producers, dense_weight(self.consumer)]
        a = self.attention
        queries, values = [a.q_proj, a.k_proj], [a.v_proj, a.o_proj]
        own = {"query_key": queries, "value_output": values, "heads": queries + values}
        return [dense_weight(linear) for linear in own[kind]]

    @property
    def output_weight(self) -> Tensor:
        """The output projection as (kv heads, value width, group × hidden), float64."""
        rows = self.output_rows.unflatten(0, (self.attention.kv_heads, -1))
        weight: Tensor = rows.transpose(1, 2).flatten(2)
        return weight

    def units(
        self, multiple_of: int, kinds: Sequence[str] = WIDTHS, biased: bool = False
    ) -> list[Unit]:
        """The axes of some kinds that can shrink; MLP widths go in multiples of ``multiple_of``.

        ``biased``: narrowing gives a bias to whatever reads the axis.
        """
        attention, name = self.attention, f"layers.{self.index}"
        hidden = attention.o_proj.out_features
        producers = self.producers
        mlp = MLP(
            name=f"{name}.mlp",
            block=self.index,
            size=inputs_by_outputs(self.consumer).shape[0],
            step=multiple_of,
            hidden=hidden,
            producers=sum(parts for _, parts in producers),
            biased_producers=sum(parts for m, parts in producers if m.bias is not None),
            new_bias=biased and self.consumer.bias is None,
        )
        units: list[Unit] = [mlp]
        if self.query_key_obstacle is None:
            query_key = QueryKey(
                name=f"{name}.query_key",
                block=self.index,
                size=attention.query_key,
                step=2,
                hidden=hidden,
                heads=attention.heads,
                kv_heads=attention.kv_heads,
                query_bias=attention.q_proj.bias is not None,
                key_bias=attention.k_proj.bias is not None,
                rotary=self.heads.rotary > 0,
            )
            units.append(query_key)
        value_output = ValueOutput(
            name=f"{name}.value_output",
            block=self.index,
            size=attention.value,
            step=1,
            hidden=hidden,
            least=0 if self.query_key_obstacle is None else 1,  # or queries would go unread
            heads=attention.heads,
            kv_heads=attention.kv_heads,
            value_bias=attention.v_proj.bias is not None,
            output_bias=attention.o_proj.bias is not None,
        )
        heads = Heads(
            name=f"{name}.heads",
            block=self.index,
            size=attention.kv_heads,
            step=1,
            hidden=hidden,
            group=attention.num_key_value_groups,
            least=0 if self.heads_obstacle is None else attention.kv_heads,
            query_key=attention.query_key,
            value=attention.value,
            query_bias=attention.q_proj.bias is not None,
            key_bias=attention.k_proj.bias is not None,
            value_bias=attention.v_proj.bias is not None,
            new_bias=biased and attention.o_proj.bias is None,
        )
        whole = WholeBlock(
            name=f"{name}.block",
            block=self.index,
            size=1,
            step=1,
            hidden=hidden,
            least=0 if self.block_obstacle is None else 1,
            parts=(mlp, heads),
            # the block before it takes the constant that stands for it
            new_bias=biased and self.index > 0 and self.sums and self.consumer.bias is None,
        )
        found = (unit for unit in (*units, value_output, heads, whole) if unit.kind in kinds)
        caches = self.anatomy.use == "causal" or self.anatomy.crossing is not None
        return [replace(unit, caches=caches, stack=self.anatomy.blocks) for unit in found]

    @property
    def query_key_obstacle(self) -> str | None:
        """Why the query/key width of this block must stay, or None."""
        if self.heads.width % 2:
            return "queries and keys stay at full width: it is odd, and they shrink in pairs"
        if self.attention.q_norm is None:
            return None
        return (
            "queries and keys stay at full width: this family normalises inside its heads, and a "
            "norm over fewer dims is another norm"
        )

    @property
    def heads_obstacle(self) -> str | None:
        """Why the KV heads of this block must stay, or None."""
        if self.anatomy.position_bias:
            return "whole heads stay: the position bias is made once, for all heads of all blocks"
        if self.attention.q_norm is None or self.anatomy.head_norms == "shared":
            return None
        return "whole heads stay: this family's norms of queries and keys are made for all of them"

    @property
    def block_obstacle(self) -> str | None:
        """Why this block must stay, or None."""
        if not self.anatomy.position_bias:
            return None
        return "whole blocks stay: the first one of a stack makes the position bias of the others"


def as_output(hidden_states: Tensor, anatomy: Anatomy, beside: Sequence[Any] | None = None) -> Any:
    """Hidden states as a block gives them, with ``beside`` or nothing for what else it gives."""
    if anatomy.outputs == 1:
        return hidden_states
    return (hidden_states, *(beside or [None] * (anatomy.outputs - 1)))


def mixed_bias(attention: NarrowAttention) -> Tensor | None:
    """What the value bias adds to the output projection's input, as attention sums to one."""
    bias = attention.v_proj.bias
    if bias is None:
        return None
    heads = bias.view(attention.kv_heads, 1, attention.value)
    return heads.expand(-1, attention.num_key_value_groups, -1).flatten()
