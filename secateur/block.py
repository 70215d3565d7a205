"""One transformer block, with weights that mean the same in every family."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from secateur.anatomy import Anatomy, HeadLayout, Projection
from secateur.layers.modeling_secateur import AnyConv1D, NarrowAttention, narrow_attention
from secateur.units import MLP, WIDTHS, Heads, QueryKey, Unit, ValueOutput


@dataclass
class Block:
    """One transformer block: its module and the weights that its units couple.

    Creating it replaces the block's attention by a :class:`NarrowAttention` of full width with
    the same weights, so that statistics and narrowing meet one kind of attention everywhere.
    ``stock_attention`` keeps the replaced module, which shares its weights where it can.
    """

    index: int
    module: nn.Module
    anatomy: Anatomy
    heads: HeadLayout
    attention: NarrowAttention = field(init=False)
    stock_attention: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.stock_attention = self.module.get_submodule(self.anatomy.attention)
        self.replace_attention(uniform_attention(self.stock_attention, self.anatomy, self.heads))

        for path in (*(path for path, _ in self.anatomy.producers), self.anatomy.consumer):
            self.module.set_submodule(path, may_be_empty(self.module.get_submodule(path)))

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
        return inputs_by_outputs(self.consumer).double()

    def set_consumer_weight(self, rows: Tensor, bias: Tensor | None = None) -> None:
        """Give the consumer another weight, (channels, outputs), and add to its bias."""
        consumer: Any = self.consumer
        dtype = inputs_by_outputs(consumer).dtype
        rows = rows.t().to(dtype).contiguous()
        set_linear(consumer, rows, with_constant(consumer.bias, bias, dtype))

    @property
    def output_rows(self) -> Tensor:
        """The output projection's weight as (heads, value width, hidden), float64."""
        attention = self.attention
        weight = attention.o_proj.weight.double().t()
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

    def parameters_of(self, kind: str) -> list[Tensor]:
        """Every parameter that goes with a channel or a KV head: (size, …) views, in one order."""
        if kind == "mlp":
            parts = [view.t() for view in self.producer_weights]
            for module, n in self.producers:
                if isinstance(module.bias, Tensor):
                    parts += module.bias.unsqueeze(1).chunk(n)
            return [*parts, inputs_by_outputs(self.consumer)]
        attention = self.attention
        maps = (attention.q_proj, attention.k_proj, attention.v_proj)
        found = [t for m in maps for t in (m.weight, m.bias) if t is not None]
        return [t.unflatten(0, (attention.kv_heads, -1)) for t in found] + [
            attention.o_proj.weight.t().unflatten(0, (attention.kv_heads, -1))
        ]

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
            query_key=attention.query_key,
            value=attention.value,
            query_bias=attention.q_proj.bias is not None,
            key_bias=attention.k_proj.bias is not None,
            value_bias=attention.v_proj.bias is not None,
            new_bias=biased and attention.o_proj.bias is None,
        )
        return [unit for unit in (*units, value_output, heads) if unit.kind in kinds]

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


def with_constant(
    bias: Tensor | None, constant: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """A bias, which may be missing, and a constant, which may be, too."""
    if constant is None or bias is None:
        return bias if constant is None else constant.to(dtype)
    return (bias.double() + constant).to(dtype)


def mixed_bias(attention: NarrowAttention) -> Tensor | None:
    """What the value bias adds to the output projection's input, as attention sums to one."""
    bias = attention.v_proj.bias
    if bias is None:
        return None
    heads = bias.view(attention.kv_heads, 1, attention.value)
    return heads.expand(-1, attention.num_key_value_groups, -1).flatten()


def uniform_attention(stock: nn.Module, anatomy: Anatomy, heads: HeadLayout) -> NarrowAttention:
    """A full-width NarrowAttention with the weights of ``stock``, in its own layout of pairs."""
    maps = anatomy.project(stock, heads)
    shape = {
        "heads": heads.heads,
        "kv_heads": heads.kv_heads,
        "query_key": heads.width,
        "value": heads.width,
        "bias": "".join(n for n, p in zip("qkvo", maps, strict=True) if p.bias is not None),
        "rotary": "all" if heads.rotary else "none",
    }
    with torch.device("meta"):
        attention = narrow_attention(stock, shape).train(stock.training)
    q, k, v, o = maps
    if 0 < heads.rotary < heads.width:
        q, k = (_pairs_first(p, heads) for p in (q, k))
    for module, part in zip(
        (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
        (q, k, v, o),
        strict=True,
    ):
        set_linear(module, part.weight, part.bias)
    return attention


def _pairs_first(part: Projection, heads: HeadLayout) -> Projection:
    """Reorder each head from (rotating halves, still rest) to (all first halves, all second)."""
    half, rest = heads.rotary // 2, (heads.width - heads.rotary) // 2
    firsts = [*range(half), *range(heads.rotary, heads.rotary + rest)]
    seconds = [*range(half, heads.rotary), *range(heads.rotary + rest, heads.width)]
    order = torch.tensor(firsts + seconds, device=part.weight.device)
    weight = part.weight.view(-1, heads.width, part.weight.shape[1])[:, order].flatten(0, 1)
    if part.bias is None:
        return Projection(weight, None)
    return Projection(weight, part.bias.view(-1, heads.width)[:, order].flatten())


def inputs_by_outputs(module: nn.Module) -> Tensor:
    """A view of a linear's or Conv1D's weight as (inputs, outputs)."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.t() if isinstance(module, nn.Linear) else weight


def may_be_empty(linear: nn.Module) -> nn.Module:
    """The linear, or for a stock Conv1D one with the same weights that may lose all its inputs."""
    if type(linear) is not Conv1D:
        return linear
    with torch.device("meta"):
        made = AnyConv1D(linear.weight.shape[1], linear.weight.shape[0])
    made.weight, made.bias = linear.weight, linear.bias
    return made


def set_linear(module: Any, weight: Tensor, bias: Tensor | None) -> None:
    """Give a linear or Conv1D other weights (outputs, inputs); its sizes follow."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    else:
        module.nx, module.nf = weight.shape[1], weight.shape[0]
        weight = weight.t()
    module.weight = nn.Parameter(weight.detach(), requires_grad=False)
    module.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
