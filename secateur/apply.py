"""Plan and statistics to weights: narrow the units of one block."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from secateur.block import Block, inputs_by_outputs, set_linear
from secateur.errors import InputError
from secateur.layers.modeling_secateur import NarrowAttention, narrow_attention
from secateur.methods.base import Method, Narrowing
from secateur.statistics import BlockStatistics
from secateur.units import Unit


def narrow_block(
    block: Block,
    units: list[Unit],
    sizes: Mapping[str, int],
    method: Method,
    statistics: BlockStatistics,
) -> None:
    """Bring the units of a block to their sizes, in place; units at full size stay untouched."""
    found = {
        unit.kind: method.compress(unit, sizes[unit.name], block, statistics)
        for unit in units
        if sizes[unit.name] < unit.size
    }
    if "mlp" in found:
        narrow_mlp(block, found["mlp"])
    if "query_key" in found or "value_output" in found:
        narrow_heads(block, found.get("query_key"), found.get("value_output"))
    for name, parameter in block.module.named_parameters():
        if found and not bool(torch.isfinite(parameter).all()):
            raise InputError(
                f"block {block.index}: narrowing gave {name} NaN or infinite numbers; give the "
                f"method larger ridges."
            )


def narrow_mlp(block: Block, narrowing: Narrowing) -> None:
    """Select the producers' channels and refit the consumer."""
    keep = narrowing.keep
    assert keep is not None
    for producer, parts in block.producers:
        weight = inputs_by_outputs(producer)  # inputs, parts * channels
        channels = weight.shape[1] // parts
        rows = torch.cat([keep + part * channels for part in range(parts)])
        bias = producer.bias
        kept_bias = bias[rows] if isinstance(bias, Tensor) else None
        set_linear(producer, weight[:, rows].t().contiguous(), kept_bias)
    consumer = block.consumer
    weight = block.consumer_weight
    refitted = weight[keep] if narrowing.decode is None else narrowing.decode @ weight
    old_bias = consumer.bias if isinstance(consumer.bias, Tensor) else None
    set_linear(consumer, refitted.t().to(inputs_by_outputs(consumer).dtype).contiguous(), old_bias)


def narrow_heads(block: Block, query_key: Narrowing | None, value_output: Narrowing | None) -> None:
    """Replace the block's attention by one of other query/key and value widths."""
    old = block.attention
    q, k, v, o = (_weight_bias(m) for m in (old.q_proj, old.k_proj, old.v_proj, old.o_proj))
    shape, pairs = dict(old.shape), None
    if query_key is not None:
        keep = query_key.keep
        assert keep is not None
        q, k = _head_rows(q, keep, old.num_key_value_groups), _head_rows(k, keep, 1)
        shape["query_key"] = keep.shape[1]
        if shape["rotary"] != "none":
            shape["rotary"] = "chosen"
            pairs = keep[:, : keep.shape[1] // 2].clamp_max(block.heads.rotary // 2)
    if value_output is not None:
        v, o = _value_output(old, v, o, value_output)
        shape["value"] = v[0].shape[0] // old.kv_heads
    shape["bias"] = "".join(
        n for n, p in zip("qkvo", (q, k, v, o), strict=True) if p[1] is not None
    )
    with torch.device("meta"):
        new = narrow_attention(block.stock_attention, shape).train(old.training)
    for module, part in zip(
        (new.q_proj, new.k_proj, new.v_proj, new.o_proj), (q, k, v, o), strict=True
    ):
        set_linear(module, *part)
    if pairs is not None:
        new.rope_pairs = nn.Buffer(pairs)
    block.replace_attention(new)


Part = tuple[Tensor, Tensor | None]


def _weight_bias(linear: nn.Linear) -> Part:
    return linear.weight, linear.bias


def _head_rows(part: Part, keep: Tensor, group: int) -> Part:
    """Keep rows ``keep`` (kv heads, k) of every head; ``group`` heads follow one KV head."""
    weight, bias = part
    keep = keep.repeat_interleave(group, 0)
    head = torch.arange(len(keep), device=keep.device).unsqueeze(1)
    rows = (head * (len(weight) // len(keep)) + keep).flatten()
    return weight[rows], None if bias is None else bias[rows]


def _value_output(
    old: NarrowAttention, value: Part, output: Part, narrowing: Narrowing
) -> tuple[Part, Part]:
    """W_V E and D W_O per KV group, with the value bias folded into the output bias."""
    encode, decode = narrowing.encode, narrowing.decode
    assert encode is not None
    assert decode is not None
    weight, bias = value
    dtype, width = weight.dtype, old.value
    values = weight.double().view(old.kv_heads, width, -1)
    outputs = output[0].double().view(-1, old.kv_heads, old.num_key_value_groups, width)
    output_bias = output[1]
    if bias is not None:
        # Attention weights sum to one, so a value's bias is a constant of the output.
        constant = torch.einsum("ohgn,hn->o", outputs, bias.double().view(old.kv_heads, width))
        if output_bias is not None:
            constant = constant + output_bias.double()
        output_bias = constant.to(dtype)
    values = torch.einsum("hnk,hni->hki", encode, values).flatten(0, 1)
    outputs = torch.einsum("hkn,ohgn->ohgk", decode, outputs).flatten(1)
    return (values.to(dtype), None), (outputs.to(dtype).contiguous(), output_bias)
