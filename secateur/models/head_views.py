"""What can become smaller in an attention: widths inside heads, and whole KV heads."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from secateur.models.linear_ops import with_constant
from secateur.models.parts import AxisView, View
from secateur.structure.narrowing import Narrowing
from secateur.structure.units import Heads, QueryKey, ValueOutput
from secateur.utils.precision import exact

if TYPE_CHECKING:
    from secateur.models.attention import Attention, Map


class InsideHeads(View):
    """A width that all heads of an attention share."""

    def __init__(self, part: "Attention") -> None:
        self.part = part

    @property
    def name(self) -> str:
        """Of the unit."""
        return unit_name(self.part, self.kind)

    def kept(self) -> AbstractContextManager[None]:
        return self.part.kept()


def unit_name(part: "Attention", kind: str) -> str:
    """``layers.3.heads``; of a second attention in the block ``layers.3.attention2.heads``."""
    inside = "" if part.name == part.role else f"{part.name}."
    return f"layers.{part.block.index}.{inside}{kind}"


class QueryKeys(InsideHeads):
    """The width of queries and keys, in rotary pairs."""

    kind = "query_key"

    def unit(self, multiple_of: int, biased: bool) -> QueryKey | None:
        if self.obstacle is not None:
            return None
        own = self.part.module
        return QueryKey(
            name=self.name,
            block=self.part.block.index,
            size=own.query_key,
            step=2,
            hidden=self.part.outputs,
            heads=own.heads,
            kv_heads=own.kv_heads,
            query_bias=own.q_proj.bias is not None,
            key_bias=own.k_proj.bias is not None,
            rotary=self.part.layout.rotary > 0,
            part=self.part.name,
            matrices=self.part.span(0, 2),
        )

    @property
    def obstacle(self) -> str | None:
        if self.part.layout.width % 2:
            return "queries and keys stay at full width: it is odd, and they shrink in pairs"
        if self.part.module.q_norm is None:
            return None
        return (
            "queries and keys stay at full width: this family normalises inside its heads, and a "
            "norm over fewer dims is another norm"
        )

    def narrow(self, narrowing: Narrowing) -> None:
        """Replace the attention by one with fewer pairs a head."""
        old, keep = self.part.module, narrowing.keep
        assert keep is not None
        group, shape = old.num_key_value_groups, dict(old.shape)
        q, k, v, o = self.part.maps
        if narrowing.encode is None:
            q = head_rows(q, keep, group)
        else:
            q = head_maps(q, narrowing.encode.repeat_interleave(group, 0))
        shape["query_key"] = keep.shape[1]
        pairs = None
        if keep.shape[1] == 0:
            shape["rotary"] = "none"
        elif shape["rotary"] != "none":
            shape["rotary"] = "chosen"
            pairs = keep[:, : keep.shape[1] // 2].clamp_max(self.part.layout.rotary // 2)
        self.part.rebuild(shape, (q, head_rows(k, keep, 1), v, o), pairs)

    def arbitrary(self, size: int) -> Narrowing:
        own = self.part.module
        half = torch.arange(size // 2, device=self.part.device)
        both = torch.cat((half, half + own.query_key // 2))
        return Narrowing(keep=both.expand(own.kv_heads, -1))


class Values(InsideHeads):
    """The rank of a head's value/output map."""

    kind = "value_output"

    def unit(self, multiple_of: int, biased: bool) -> ValueOutput:
        own = self.part.module
        return ValueOutput(
            name=self.name,
            block=self.part.block.index,
            size=own.value,
            step=1,
            hidden=self.part.outputs,
            least=0 if self.part.views["query_key"].obstacle is None else 1,  # or queries go unread
            heads=own.heads,
            kv_heads=own.kv_heads,
            value_bias=own.v_proj.bias is not None,
            output_bias=own.o_proj.bias is not None,
            part=self.part.name,
            matrices=self.part.span(2, 4),
        )

    def narrow(self, narrowing: Narrowing) -> None:
        """Replace the attention by one with narrower values, or change its output alone."""
        old, encode, consumer = self.part.module, narrowing.encode, narrowing.consumer
        assert consumer is not None
        rows = consumer.t().to(old.o_proj.weight)
        if encode is None:  # in place, as the stock attention shares the weight and may be written
            old.o_proj.weight.data.copy_(rows)
            return
        q, k, v, _ = self.part.maps
        values, _ = head_maps((v[0], None), encode)
        output = (rows.contiguous(), self.part.folded_bias())
        shape = {**old.shape, "value": encode.shape[2]}
        pairs = getattr(old, "rope_pairs", None)
        self.part.rebuild(shape, (q, k, (values, None), output), pairs)

    def arbitrary(self, size: int) -> Narrowing:
        own = self.part.module
        encode = torch.eye(own.value, dtype=torch.float64, device=self.part.device)[:, :size]
        consumer = self.part.output_rows[:, :size].flatten(0, 1)
        return Narrowing(encode=encode.expand(own.kv_heads, -1, -1), consumer=consumer)


class WholeHeads(AxisView):
    """KV heads, each with the query heads that read it."""

    kind = "heads"
    part: "Attention"

    def unit(self, multiple_of: int, biased: bool) -> Heads:
        own = self.part.module
        return Heads(
            name=unit_name(self.part, self.kind),
            block=self.part.block.index,
            size=own.kv_heads,
            step=1,
            hidden=self.part.outputs,
            group=own.num_key_value_groups,
            least=0 if self.obstacle is None else own.kv_heads,
            query_key=own.query_key,
            value=own.value,
            query_bias=own.q_proj.bias is not None,
            key_bias=own.k_proj.bias is not None,
            value_bias=own.v_proj.bias is not None,
            new_bias=biased and own.o_proj.bias is None,
            part=self.part.name,
            matrices=self.part.span(0, 4),
        )

    @property
    def obstacle(self) -> str | None:
        anatomy = self.part.block.anatomy
        if anatomy.position_bias:
            return "whole heads stay: the position bias is made once, for all heads of all blocks"
        if self.part.module.q_norm is None or anatomy.head_norms == "shared":
            return None
        return "whole heads stay: this family's norms of queries and keys are made for all of them"

    def narrow(self, narrowing: Narrowing) -> None:
        """Replace the attention by one with fewer KV heads and the query heads of those."""
        old, keep = self.part.module, narrowing.keep
        assert keep is not None
        q, k, v, o = self.part.maps
        kept = [whole_heads(part, keep, old.kv_heads) for part in (q, k, v)]
        rows = narrowing.consumer
        if rows is None:
            rows, _ = whole_heads((o[0].t(), None), keep, old.kv_heads)
        weight = rows.t().to(o[0]).contiguous()
        output = (weight, with_constant(o[1], narrowing.bias, o[0]))
        shape = dict(old.shape)
        if len(keep):
            shape |= {"heads": len(keep) * old.num_key_value_groups, "kv_heads": len(keep)}
        else:  # none left: the heads that there are have no width
            shape |= {"query_key": 0, "value": 0, "rotary": "none"}
        self.part.rebuild(shape, (*kept, output), None)

    def arbitrary(self, size: int) -> Narrowing:
        return Narrowing(keep=torch.arange(size, device=self.part.device))

    def read(self) -> Tensor:
        """The coordinates of a KV head are those of all query heads that read it."""
        heads = self.part.output_rows.unflatten(0, (self.part.module.kv_heads, -1))
        rows: Tensor = heads.flatten(1, 2)
        return rows

    @property
    def constant(self) -> Tensor | None:
        return self.part.mixed_bias

    def parameters(
        self, of: Callable[[Tensor], Tensor] = lambda parameter: parameter
    ) -> list[Tensor]:
        own = self.part.module
        maps = (own.q_proj, own.k_proj, own.v_proj)
        parts = [of(t) for m in maps for t in (m.weight, m.bias) if t is not None]
        parts.append(of(own.o_proj.weight).t())
        return [part.unflatten(0, (own.kv_heads, -1)) for part in parts]


def whole_heads(part: "Map", keep: Tensor, kv_heads: int) -> "Map":
    """The rows of some KV heads, and of the query heads that read them."""
    weight, bias = part
    rows = weight.unflatten(0, (kv_heads, -1))[keep].flatten(0, 1)
    return rows, None if bias is None else bias.view(kv_heads, -1)[keep].flatten()


def head_rows(part: "Map", keep: Tensor, group: int) -> "Map":
    """Keep rows ``keep`` (kv heads, k) of every head; ``group`` heads follow one KV head."""
    weight, bias = part
    keep = keep.repeat_interleave(group, 0)
    head = torch.arange(len(keep), device=keep.device).unsqueeze(1)
    rows = (head * (len(weight) // len(keep)) + keep).flatten()
    return weight[rows], None if bias is None else bias[rows]


def head_maps(part: "Map", encode: Tensor) -> "Map":
    """Multiply ``encode`` (heads, n, k) into the rows of every head."""
    weight, bias = part
    rows = exact(weight).unflatten(0, (len(encode), -1))
    mapped = torch.einsum("hnk,hni->hki", encode, rows).flatten(0, 1).to(weight)
    if bias is None:
        return mapped, None
    heads = exact(bias).view(len(encode), -1, 1)
    return mapped, (encode.mT @ heads).flatten().to(bias)
