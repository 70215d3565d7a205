"""Falcon: q, k, v in one linear, grouped by KV head; rotary positions.

The stock attention of the new decoder architecture caches its keys and values once a query head;
a narrowed one caches them once a KV head.
"""

from dataclasses import replace
from typing import Any

from torch import nn

from secateur.families.base import Anatomy, HeadLayout, Projection, Projections, linear


def project(attention: nn.Module, heads: HeadLayout) -> Projections:
    """Each KV head's rows in the fused linear are its queries, its key, its value."""
    fused = linear(attention.get_submodule("query_key_value"))
    parts, group = (heads.kv_heads, -1, heads.width), heads.heads // heads.kv_heads
    weight = fused.weight.view(*parts, fused.weight.shape[1])
    bias = None if fused.bias is None else fused.bias.view(*parts)
    q, k, v = (
        Projection(weight[:, rows].flatten(0, 2), None if bias is None else bias[:, rows].flatten())
        for rows in (slice(group), slice(group, group + 1), slice(group + 1, None))
    )
    return Projections(q, k, v, linear(attention.get_submodule("dense")))


def layout(heads: HeadLayout, config: Any, block: int) -> HeadLayout:
    """The count of KV heads has its own name, and in older models its own rules."""
    if config.new_decoder_architecture:
        return replace(heads, kv_heads=config.num_kv_heads)
    return replace(heads, kv_heads=1 if config.multi_query else heads.heads)


def refusal(config: Any) -> str | None:
    """ALiBi adds to the scores what NarrowAttention does not know."""
    if config.alibi:
        return "this Falcon has ALiBi positions (alibi), which are not served, only rotary ones"
    return None


FALCON = Anatomy(
    family="Falcon",
    model_types=("falcon",),
    blocks="h",
    attention="self_attention",
    project=project,
    producers=(("mlp.dense_h_to_4h", 1),),
    activation="mlp.act",
    consumer="mlp.dense_4h_to_h",
    width_key="ffn_hidden_size",
    rotary=True,
    layout=layout,
    outputs=2,
    refusal=refusal,
)
