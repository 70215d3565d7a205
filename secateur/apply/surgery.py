"""Plan and statistics to weights: narrow the units of one block."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.apply.narrowing_messages import gather_narrowings
from secateur.calibration.statistics import BlockStatistics
from secateur.distributed.collectives import ALONE, Ranks
from secateur.layers.attention_secateur import NarrowAttention, narrow_attention
from secateur.methods.base import Method, Narrowing
from secateur.models.block import Block, mixed_bias
from secateur.models.linear_ops import inputs_by_outputs, set_linear, with_constant
from secateur.structure.units import Matrix, Unit
from secateur.utils.errors import InputError
from secateur.utils.precision import exact

Part = tuple[Tensor, Tensor | None]  #: weight and bias of a map


def narrow_block(
    block: Block,
    units: list[Unit],
    sizes: Mapping[str, int],
    method: Method,
    statistics: BlockStatistics,
    ranks: Ranks = ALONE,
) -> None:
    """Bring the units of a block to their sizes, in place; units at full size stay untouched.

    Several ``ranks`` solve a unit each, and all narrow all.
    """
    changing = [unit for unit in units if sizes[unit.name] < unit.size]
    with block.solving():
        own = {
            unit.name: method.solve(unit, block, statistics).at(sizes[unit.name])
            for place, unit in enumerate(changing)
            if ranks.owns(block.index + place)
        }
    found = gather_narrowings(own, ranks)
    for unit in changing:
        narrow_unit(block, unit, found[unit.name])
    check_finite(block)


@contextmanager
def narrowed(block: Block, unit: Unit, narrowing: Narrowing) -> Iterator[None]:
    """A block with one unit below its full size, for as long as it takes to look at it."""
    if isinstance(unit, Matrix):
        layers = {path: block.module.get_submodule(path) for path in unit.paths}
        try:
            narrow_unit(block, unit, narrowing)
            yield
        finally:
            for path, layer in layers.items():
                block.module.set_submodule(path, layer)
        return
    linears = [*(producer for producer, _ in block.producers), block.consumer]
    before = [(module, inputs_by_outputs(module).t(), module.bias) for module in linears]
    attention = block.attention
    try:
        narrow_unit(block, unit, narrowing)
        yield
    finally:
        for module, weight, bias in before:
            set_linear(module, weight, bias if isinstance(bias, Tensor) else None)
        block.replace_attention(attention)
        if unit.kind == "block":
            block.put_back()


def narrow_unit(block: Block, unit: Unit, narrowing: Narrowing) -> None:
    """Bring one unit of a block to another size, in place; it may come from another device."""
    if isinstance(unit, Matrix):
        for path, layer in narrowing.layers.items():
            block.module.set_submodule(path, layer.to(block.device))
        return
    if narrowing.keep is not None:
        narrowing = replace(narrowing, keep=narrowing.keep.to(block.device))
    narrow = {
        "mlp": narrow_mlp,
        "heads": narrow_heads,
        "query_key": narrow_query_key,
        "value_output": narrow_value_output,
        "block": remove_block,
    }
    narrow[unit.kind](block, narrowing)


def remove_block(block: Block, narrowing: Narrowing) -> None:
    """Let a block hand on what it gets, and a constant for what is gone."""
    block.remove(narrowing.bias)


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
    kept = narrowing.consumer
    if kept is None:
        kept = inputs_by_outputs(block.consumer)[keep]
    block.set_consumer_weight(kept, narrowing.bias)


def narrow_heads(block: Block, narrowing: Narrowing) -> None:
    """Replace the block's attention by one with fewer KV heads and the query heads of those."""
    old, keep = block.attention, narrowing.keep
    assert keep is not None
    q, k, v, o = _parts(old)
    kept = [_whole_heads(part, keep, old.kv_heads) for part in (q, k, v)]
    rows = narrowing.consumer
    if rows is None:
        rows, _ = _whole_heads((o[0].t(), None), keep, old.kv_heads)
    weight = rows.t().to(o[0]).contiguous()
    output = (weight, with_constant(o[1], narrowing.bias, o[0]))
    shape = dict(old.shape)
    if len(keep):
        shape |= {"heads": len(keep) * old.num_key_value_groups, "kv_heads": len(keep)}
    else:  # none left: the heads that there are have no width
        shape |= {"query_key": 0, "value": 0, "rotary": "none"}
    _rebuild(block, shape, (*kept, output), None)


def _whole_heads(part: Part, keep: Tensor, kv_heads: int) -> Part:
    weight, bias = part
    rows = weight.unflatten(0, (kv_heads, -1))[keep].flatten(0, 1)
    return rows, None if bias is None else bias.view(kv_heads, -1)[keep].flatten()


def narrow_query_key(block: Block, narrowing: Narrowing) -> None:
    """Replace the block's attention by one with fewer pairs a head."""
    old, keep = block.attention, narrowing.keep
    assert keep is not None
    group, shape = old.num_key_value_groups, dict(old.shape)
    q, k, v, o = _parts(old)
    if narrowing.encode is None:
        q = _head_rows(q, keep, group)
    else:
        q = _head_maps(q, narrowing.encode.repeat_interleave(group, 0))
    shape["query_key"] = keep.shape[1]
    pairs = None
    if keep.shape[1] == 0:
        shape["rotary"] = "none"
    elif shape["rotary"] != "none":
        shape["rotary"] = "chosen"
        pairs = keep[:, : keep.shape[1] // 2].clamp_max(block.heads.rotary // 2)
    _rebuild(block, shape, (q, _head_rows(k, keep, 1), v, o), pairs)


def narrow_value_output(block: Block, narrowing: Narrowing) -> None:
    """Replace the block's attention by one with narrower values, or change its output alone."""
    old, encode, consumer = block.attention, narrowing.encode, narrowing.consumer
    assert consumer is not None
    rows = consumer.t().to(old.o_proj.weight)
    if encode is None:  # in place, as the stock attention shares the weight and may be written
        old.o_proj.weight.data.copy_(rows)
        return
    q, k, v, _ = _parts(old)
    values, _ = _head_maps((v[0], None), encode)
    output = (rows.contiguous(), folded_bias(old))
    shape = {**old.shape, "value": encode.shape[2]}
    _rebuild(block, shape, (q, k, (values, None), output), getattr(old, "rope_pairs", None))


def _rebuild(
    block: Block, shape: dict[str, Any], parts: tuple[Part, ...], pairs: Tensor | None
) -> None:
    old = block.attention
    shape["bias"] = "".join(n for n, p in zip("qkvo", parts, strict=True) if p[1] is not None)
    with torch.device("meta"):
        new = narrow_attention(block.stock_attention, shape).train(old.training)
    modules = (new.q_proj, new.k_proj, new.v_proj, new.o_proj)
    for module, part in zip(modules, parts, strict=True):
        set_linear(module, *part)
    new.q_norm, new.k_norm = old.q_norm, old.k_norm  # the stock ones may have another order
    if pairs is not None:
        new.rope_pairs = nn.Buffer(pairs)
    block.replace_attention(new)


def _parts(attention: NarrowAttention) -> tuple[Part, Part, Part, Part]:
    """Weight and bias of its four maps."""
    q, k, v, o = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
    return (q.weight, q.bias), (k.weight, k.bias), (v.weight, v.bias), (o.weight, o.bias)


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
    rows = exact(weight).unflatten(0, (len(encode), -1))
    mapped = torch.einsum("hnk,hni->hki", encode, rows).flatten(0, 1).to(weight)
    if bias is None:
        return mapped, None
    heads = exact(bias).view(len(encode), -1, 1)
    return mapped, (encode.mT @ heads).flatten().to(bias)


def folded_bias(attention: NarrowAttention) -> Tensor | None:
    """The output bias with what the value bias adds, a constant as attention sums to one."""
    mixed, output = mixed_bias(attention), attention.o_proj
    if mixed is None:
        return output.bias
    constant = exact(output.weight) @ exact(mixed)
    if output.bias is not None:
        constant = constant + exact(output.bias)
    return constant.to(output.weight)
