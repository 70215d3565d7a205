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
        unit.kind: method.solve(unit, block, statistics).at(sizes[unit.name])
        for unit in units
        if sizes[unit.name] < unit.size
    }
    if "mlp" in found:
        narrow_mlp(block, found["mlp"])
    if "query_key" in found or "value_output" in found:
        narrow_heads(block, found.get("query_key"), found.get("value_output"))
    check_finite(block)


def check_finite(block: Block) -> None:
    """Refuse what narrowing should never give.

    Raises:
        InputError: a weight of the block is NaN or infinite.
    """
    for name, parameter in block.module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
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
    rows = block.consumer_weight[keep] if narrowing.consumer is None else narrowing.consumer
    old_bias = consumer.bias if isinstance(consumer.bias, Tensor) else None
    set_linear(consumer, rows.t().to(inputs_by_outputs(consumer).dtype).contiguous(), old_bias)


def narrow_heads(block: Block, query_key: Narrowing | None, value_output: Narrowing | None) -> None:
    """Replace the block's attention by one of other query/key and value widths."""
    old = block.attention
    q, k, v, o = (_weight_bias(m) for m in (old.q_proj, old.k_proj, old.v_proj, old.o_proj))
    shape, pairs = dict(old.shape), None
    if query_key is not None:
        keep = query_key.keep
        assert keep is not None
        group = old.num_key_value_groups
        if query_key.encode is None:
            q = _head_rows(q, keep, group)
        else:
            q = _head_maps(q, query_key.encode.repeat_interleave(group, 0))
        k = _head_rows(k, keep, 1)
        shape["query_key"] = keep.shape[1]
        if shape["query_key"] == 0:
            shape["rotary"] = "none"
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


def _head_maps(part: Part, encode: Tensor) -> Part:
    """Multiply ``encode`` (heads, n, k) into the rows of every head."""
    weight, bias = part
    rows = weight.double().unflatten(0, (len(encode), -1))
    mapped = torch.einsum("hnk,hni->hki", encode, rows).flatten(0, 1).to(weight.dtype)
    if bias is None:
        return mapped, None
    heads = bias.double().view(len(encode), -1, 1)
    return mapped, (encode.mT @ heads).flatten().to(bias.dtype)


def _value_output(
    old: NarrowAttention, value: Part, output: Part, narrowing: Narrowing
) -> tuple[Part, Part]:
    """W_V E and the new output projection, with the value bias folded into the output bias."""
    encode, consumer = narrowing.encode, narrowing.consumer
    assert encode is not None
    assert consumer is not None
    values, _ = _head_maps((value[0], None), encode)
    dtype = value[0].dtype
    return (values, None), (consumer.t().to(dtype).contiguous(), folded_bias(old, value, output))


def folded_bias(old: NarrowAttention, value: Part, output: Part) -> Tensor | None:
    """The output bias with what the value bias adds, a constant as attention sums to one."""
    bias = value[1]
    if bias is None:
        return output[1]
    heads = bias.double().view(old.kv_heads, 1, old.value)
    constant = output[0].double() @ heads.expand(-1, old.num_key_value_groups, -1).flatten()
    if output[1] is not None:
        constant = constant + output[1].double()
    return constant.to(value[0].dtype)
