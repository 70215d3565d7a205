"""Tensors of a GGUF file, with llama.cpp's names and head layout."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from secateur.export.gguf.shapes import Layer, Layout, score_factor
from secateur.models.block import Block
from secateur.models.linear_ops import inputs_by_outputs
from secateur.models.model import Model

Named = tuple[str, Tensor]


def tensors(model: Model, layout: Layout) -> Iterator[Named]:
    """All tensors in float32, created one by one."""
    module: Any = model.module
    embedding = module.get_input_embeddings().weight
    yield "token_embd.weight", embedding.float()
    if layout.factors is not None:
        yield "rope_freqs.weight", layout.factors.float()
    for number, (block, layer) in enumerate(zip(model.blocks, layout.layers, strict=True)):
        for name, tensor in (*attention(block, layer, layout), *mlp(block, layer)):
            yield f"blk.{number}.{name}", tensor.float().contiguous()
    yield "output_norm.weight", module.base_model.norm.weight.float()
    head = module.get_output_embeddings().weight
    if head is not embedding:
        yield "output.weight", head.float()


def attention(block: Block, layer: Layer, layout: Layout) -> Iterator[Named]:
    """The norm and the projections of an attention; none if the layer has no head."""
    if not layer.heads:
        return
    architecture, own = layout.architecture, block.attention.module
    norm: Any = block.module.get_submodule("input_layernorm")
    yield "attn_norm.weight", norm.weight
    if own.value:
        maps = _maps(block, layout)
    else:  # one head, whose values nobody reads
        nothing = norm.weight.new_zeros(layout.head, len(norm.weight))
        maps = dict.fromkeys("qkv", (nothing, None)) | {"o": (nothing.t(), own.o_proj.bias)}
    if architecture.fused:
        yield "attn_qkv.weight", torch.cat([maps[name][0] for name in "qkv"])
    else:
        for name in "qkv":
            weight, bias = maps[name]
            yield f"attn_{name}.weight", weight
            if bias is not None:
                yield f"attn_{name}.bias", bias
    if architecture.head_norms:
        for name, inside in (("q", own.q_norm), ("k", own.k_norm)):
            factor = score_factor(block, layout) if name == "q" else 1.0
            held: Any = inside
            weight = held.weight * factor if own.value else norm.weight.new_ones(layout.head)
            yield f"attn_{name}_norm.weight", weight
    weight, bias = maps["o"]
    yield "attn_output.weight", weight
    if bias is not None:
        yield "attn_output.bias", bias


def _maps(block: Block, layout: Layout) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Weights and biases of the four projections, with heads padded with zeros to the file's
    width.
    """
    own, head = block.attention.module, layout.head
    keys = places(block, layout)
    queries = keys.repeat_interleave(own.num_key_value_groups, 0)
    values = torch.arange(own.value).expand(own.kv_heads, -1)
    # Where a norm stands between, what the scores want is in its weight.
    factor = 1.0 if layout.architecture.head_norms else score_factor(block, layout)
    found: dict[str, tuple[Tensor, Tensor | None]] = {
        "q": _padded(own.q_proj, queries, head, factor),
        "k": _padded(own.k_proj, keys, head),
        "v": _padded(own.v_proj, values, head),
    }
    rows = own.o_proj.weight.t().unflatten(0, (own.heads, own.value))
    wide = rows.new_zeros(own.heads, head, rows.shape[2])
    wide[:, : own.value] = rows
    found["o"] = wide.flatten(0, 1).t(), own.o_proj.bias
    return found


def places(block: Block, layout: Layout) -> Tensor:
    """For each KV head, the positions of its query and key dimensions in the file, (heads, dims).

    Our pairs have their members in two halves of the head. If the file has adjacent pairs, the
    members of pair i are at 2i and 2i + 1.
    """
    own = block.attention.module
    if own.rotary == "chosen":
        at = {pair: place for place, pair in enumerate(layout.pairs)}
        pairs = torch.tensor([[at[p] for p in row] for row in own.rope_pairs.tolist()])
        pairs = pairs.view(own.kv_heads, -1).long()
    else:
        pairs = torch.arange(own.query_key // 2).expand(own.kv_heads, -1)
    if layout.architecture.interleaved:
        return torch.cat((2 * pairs, 2 * pairs + 1), 1)
    return torch.cat((pairs, pairs + layout.head // 2), 1)


def _padded(
    linear: Any, where: Tensor, head: int, factor: float = 1.0
) -> tuple[Tensor, Tensor | None]:
    """A projection into heads, (heads × width, inputs), with the dimensions at given positions."""
    heads, width = where.shape
    index = torch.arange(heads).unsqueeze(1) * head + where

    def placed(part: Tensor) -> Tensor:
        made = part.new_zeros(heads * head, *part.shape[1:])
        made[index.flatten().to(part.device)] = part if factor == 1.0 else part * factor
        return made

    if not width:
        return linear.weight.new_zeros(heads * head, linear.in_features), None
    return placed(linear.weight), None if linear.bias is None else placed(linear.bias)


def mlp(block: Block, layer: Layer) -> Iterator[Named]:
    """The norm and the projections of an MLP; a removed MLP has one channel of zeros.

    llama.cpp skips the attention of a layer without an MLP.
    """
    norm: Any = block.module.get_submodule("post_attention_layernorm")
    yield "ffn_norm.weight", norm.weight
    consumer: Any = block.mlp.consumer
    gone = not inputs_by_outputs(consumer).shape[0]
    made = [bias for m, parts in block.mlp.producers for bias in _biases(m, parts)]
    weights = block.mlp.producer_weights
    for name, weight, bias in zip(("gate", "up"), weights, made, strict=True):
        yield f"ffn_{name}.weight", weight.new_zeros(1, len(weight)) if gone else weight.t()
        if bias is not None:
            yield f"ffn_{name}.bias", bias.new_zeros(1) if gone else bias
    down = inputs_by_outputs(consumer).t()
    yield "ffn_down.weight", down.new_zeros(len(down), 1) if gone else down
    if consumer.bias is not None:
        yield "ffn_down.bias", consumer.bias


def _biases(module: Any, parts: int) -> list[Tensor | None]:
    return [None] * parts if module.bias is None else [*module.bias.chunk(parts)]
