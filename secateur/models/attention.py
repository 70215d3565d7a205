"""Attention as a part of a block, in its canonical form."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur.families import HeadLayout
from secateur.layers.attention_secateur import NarrowAttention, RelativeAttention, narrow_attention
from secateur.models.canonical_attention import canonical_attention
from secateur.models.head_views import QueryKeys, Values, WholeHeads
from secateur.models.linear_ops import dense_weight, set_linear
from secateur.models.parts import Give, Handle, LinearPath, Part, by_kind, entering
from secateur.utils.precision import exact

if TYPE_CHECKING:
    from secateur.models.block import Block

Map = tuple[Tensor, Tensor | None]  #: weight and bias


class Attention(Part):
    """The attention of a block.

    Creating it replaces the block's attention by a :class:`NarrowAttention` of full width with the
    same weights, so that statistics and pruning meet one kind of attention everywhere. In a
    checkpoint that is compressed already the attention stays what it is.

    Attributes:
        path: of the module in the block.
        layout: how the heads lie in the family's own attention.
        module: the attention in the block.
        stock: the module that was replaced, which shares its weights where it can.
    """

    role = "attention"
    module: NarrowAttention

    def __init__(self, block: "Block", number: int, layout: HeadLayout) -> None:
        super().__init__(block, number)
        assert block.anatomy.attention is not None
        self.path, self.layout = block.anatomy.attention, layout
        self._projecting: list[bool] = []  # not empty while scores make queries of their own
        self.stock: nn.Module = block.module.get_submodule(self.path)
        if isinstance(self.stock, NarrowAttention):  # of a compressed checkpoint
            self.module = self.stock
        else:
            self.restore()
        self.views = dict(by_kind((QueryKeys(self), Values(self), WholeHeads(self))))

    def replace(self, attention: NarrowAttention) -> None:
        """Put another attention in the block."""
        self.module = attention
        self.block.module.set_submodule(self.path, attention)

    def restore(self) -> None:
        """Put the canonical form of the stock attention in the block, as its weights are now."""
        self.replace(canonical_attention(self.stock, self.block.anatomy, self.layout))

    def published(self, name: str) -> bool:
        """Whether the stock attention has this linear of ours, dims in the same order."""
        there = isinstance(getattr(self.stock, name, None), nn.Linear)
        return there and self.layout.pairs == sorted(self.layout.pairs)

    @property
    def outputs(self) -> int:
        return self.module.o_proj.out_features

    @property
    def device(self) -> torch.device:
        return self.module.o_proj.weight.device

    @property
    def linear_paths(self) -> list[LinearPath]:
        sides = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "attention_inputs")
        return [
            LinearPath(f"{self.path}.{name}", side, 1, self.published(name))
            for name, side in (*sides.items(), ("o_proj", "output_inputs"))
        ]

    @property
    def matrices(self) -> list[Tensor]:
        own = self.module
        return [dense_weight(linear) for linear in (own.q_proj, own.k_proj, own.v_proj, own.o_proj)]

    @property
    def output_rows(self) -> Tensor:
        """The output projection's weight as (heads, value width, hidden), float64."""
        weight = exact(self.module.o_proj.weight).t()
        rows: Tensor = weight.unflatten(0, (self.module.heads, self.module.value))
        return rows

    @property
    def output_weight(self) -> Tensor:
        """The output projection as (kv heads, value width, group × hidden), float64."""
        rows = self.output_rows.unflatten(0, (self.module.kv_heads, -1))
        weight: Tensor = rows.transpose(1, 2).flatten(2)
        return weight

    @property
    def mixed_bias(self) -> Tensor | None:
        """What the value bias adds to the output projection's input, as attention sums to one."""
        return mixed_bias(self.module)

    def mixed_values(self, values: Tensor) -> Tensor:
        """The output projection's input without what the value bias adds to it."""
        bias = self.mixed_bias
        return values if bias is None else values - bias

    def folded_bias(self) -> Tensor | None:
        """The output bias with what the value bias adds, a constant as attention sums to one."""
        mixed, output = self.mixed_bias, self.module.o_proj
        if mixed is None:
            return output.bias
        constant = exact(output.weight) @ exact(mixed)
        if output.bias is not None:
            constant = constant + exact(output.bias)
        return constant.to(output.weight)

    @property
    def maps(self) -> tuple[Map, Map, Map, Map]:
        """Weight and bias of queries, keys, values and output."""
        own = self.module
        q, k, v, o = own.q_proj, own.k_proj, own.v_proj, own.o_proj
        return (q.weight, q.bias), (k.weight, k.bias), (v.weight, v.bias), (o.weight, o.bias)

    def rebuild(self, shape: dict[str, Any], maps: tuple[Map, ...], pairs: Tensor | None) -> None:
        """Put an attention of another shape in the block, with these maps and rotary pairs."""
        old = self.module
        shape["bias"] = "".join(n for n, p in zip("qkvo", maps, strict=True) if p[1] is not None)
        with torch.device("meta"):
            new = narrow_attention(self.stock, shape).train(old.training)
        modules = (new.q_proj, new.k_proj, new.v_proj, new.o_proj)
        for module, part in zip(modules, maps, strict=True):
            set_linear(module, *part)
        new.q_norm, new.k_norm = old.q_norm, old.k_norm  # the stock ones may have another order
        if pairs is not None:
            new.rope_pairs = nn.Buffer(pairs)
        self.replace(new)

    def features(self, side: str) -> tuple[int, ...] | None:
        own = self.module
        query_key = own.kv_heads, own.query_key
        mixed = (own.heads * own.value,)
        found = {
            **{"query": (own.heads, own.query_key), "key": query_key},
            **{"value": (own.kv_heads, own.value), "heads": (own.kv_heads,)},
            **{
                "mixed": mixed,
                "output_inputs": mixed,
                "attention_inputs": (self.outputs,),
            },
        }
        if self.views["query_key"].obstacle is None:
            found["scores"] = query_key
        return found.get(side.rpartition(":")[2])

    def watch(
        self, side: str, give: Give, shape: Sequence[int], wanted: Callable[[], bool]
    ) -> Handle:
        own, projecting = self.module, self._projecting

        def seen(*values: Tensor) -> None:
            if not projecting:  # by the scores' own use of the projections
                give(*values)

        def heads(_: nn.Module, args: Any, output: Tensor) -> None:
            if own.q_norm is not None and own.shape.get("head_norms") == "list":
                output = output.transpose(1, 2)
            seen(output.reshape(*shape, -1, own.query_key))

        def value(_: nn.Module, args: Any, output: Tensor) -> None:
            seen(unbiased(output, own.v_proj).reshape(*shape, -1, own.value))

        def mixed(_: nn.Module, args: Any) -> None:
            seen(self.mixed_values(args[0]))

        def scores(_: nn.Module, args: Any, kwargs: Any) -> None:
            if not wanted():
                return
            projecting.append(True)
            values = self._scores(args, kwargs)
            projecting.pop()
            give(*values)

        if side == "scores":
            return own.register_forward_pre_hook(scores, with_kwargs=True)
        hooks: dict[str, Callable[[], Handle]] = {
            "attention_inputs": lambda: own.q_proj.register_forward_pre_hook(entering(seen, shape)),
            "output_inputs": lambda: own.o_proj.register_forward_pre_hook(entering(seen, shape)),
            "query": lambda: (own.q_norm or own.q_proj).register_forward_hook(heads),
            "key": lambda: (own.k_norm or own.k_proj).register_forward_hook(heads),
            "value": lambda: own.v_proj.register_forward_hook(value),
            "mixed": lambda: own.o_proj.register_forward_pre_hook(mixed),
        }
        return hooks[side]()

    def _scores(self, args: Any, kwargs: Any) -> tuple[Tensor, ...]:
        """Queries, keys and values as the statistic ``PairScores`` takes them."""
        own = self.module
        states = args[0] if args else kwargs["hidden_states"]
        query, key, value = own.project(states, kwargs.get("position_embeddings"))
        # u = v W_O has the inner products of v L with W_O W_Oᵀ = L Lᵀ, no wider than a head.
        weight = exact(own.o_proj.weight).view(-1, own.heads, own.value)
        metric = torch.einsum("dhi,dhj->hij", weight, weight)
        eye = torch.eye(own.value, dtype=metric.dtype, device=metric.device)
        tiny = 1e-9 * metric.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-200)
        root = torch.linalg.cholesky(metric + tiny[:, None, None] * eye)
        value = value.repeat_interleave(own.num_key_value_groups, 1)
        turning = torch.arange(own.query_key // 2, device=query.device) < self.layout.rotary // 2
        reach = (own.sliding_window or query.shape[2]) if own.is_causal else 0
        window = torch.tensor(reach, device=query.device)
        given = query * own.scaling, key, value @ root.to(value), turning, window
        if isinstance(own, RelativeAttention):
            bias = kwargs["position_bias"]
            bias = own.bias_of(query.shape[2]) if bias is None else bias
            return *given, query.new_zeros(()), bias[0]
        return given if own.soft_cap is None else (*given, query.new_tensor(own.soft_cap))

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Narrowing replaces the module, or changes the output projection in place."""
        attention = self.module
        try:
            yield
        finally:
            self.replace(attention)

    def notes(self, kinds: Sequence[str]) -> list[str]:
        if self.block.anatomy.crossing is None or not {"query_key", "value_output"} & {*kinds}:
            return []
        return [
            "the decoder's attention to the encoder stays at full width: its keys and values are "
            "of another stream than its queries, and no statistic is taken of them"
        ]


def unbiased(output: Tensor, linear: nn.Linear) -> Tensor:
    """A linear's output without its bias.

    A value's bias reaches the output whole, as attention weights sum to one; it is folded into the
    output's bias and is no part of what has to be rebuilt.
    """
    return output if linear.bias is None else output - linear.bias


def mixed_bias(attention: NarrowAttention) -> Tensor | None:
    """What the value bias adds to the output projection's input, as attention sums to one."""
    bias = attention.v_proj.bias
    if bias is None:
        return None
    heads = bias.view(attention.kv_heads, 1, attention.value)
    return heads.expand(-1, attention.num_key_value_groups, -1).flatten()
