"""Families of GPT's shape: an MLP without a gate, projections that are often fused."""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from secateur.families.base import (
    Anatomy,
    HeadLayout,
    Projection,
    Projections,
    linear,
    separate,
    split,
)

# GPT-2: Conv1D layers (weights stored inputs × outputs), fused c_attn, learned positions.


def gpt2_project(attention: nn.Module, heads: HeadLayout) -> Projections:
    """The fused Conv1D holds all queries, then all keys, then all values."""
    width = heads.heads * heads.width
    q, k, v = split(conv1d(attention.get_submodule("c_attn")), width, width, width)
    return Projections(q, k, v, conv1d(attention.get_submodule("c_proj")))


def conv1d(module: nn.Module) -> Projection:
    """Weight and bias of a Conv1D, as a linear has them."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    assert isinstance(bias, Tensor)
    return Projection(weight.t(), bias)


GPT2 = Anatomy(
    family="GPT-2",
    model_types=("gpt2",),
    blocks="h",
    attention="attn",
    project=gpt2_project,
    producers=(("mlp.c_fc", 1),),
    activation="mlp.act",
    consumer="mlp.c_proj",
    width_key="n_inner",
    rotary=False,
)


# GPT-NeoX and Pythia: q, k, v interleaved by head in one linear, partial rotary positions.


def gpt_neox_project(attention: nn.Module, heads: HeadLayout) -> Projections:
    """Each head's rows in the fused linear are its query, its key, its value."""
    fused = linear(attention.get_submodule("query_key_value"))
    parts = (heads.heads, 3, heads.width)
    weight = fused.weight.view(*parts, -1)
    bias = None if fused.bias is None else fused.bias.view(*parts)
    q, k, v = (
        Projection(weight[:, i].flatten(0, 1), None if bias is None else bias[:, i].flatten())
        for i in range(3)
    )
    return Projections(q, k, v, linear(attention.get_submodule("dense")))


GPT_NEOX = Anatomy(
    family="GPT-NeoX / Pythia",
    model_types=("gpt_neox",),
    blocks="layers",
    attention="attention",
    project=gpt_neox_project,
    producers=(("mlp.dense_h_to_4h", 1),),
    activation="mlp.act",
    consumer="mlp.dense_4h_to_h",
    width_key="intermediate_size",
    rotary=True,
)


# OPT: biases everywhere, LayerNorm, ReLU MLP, learned positions.

OPT = Anatomy(
    family="OPT",
    model_types=("opt",),
    blocks="decoder.layers",
    attention="self_attn",
    project=separate("q_proj", "k_proj", "v_proj", "out_proj"),
    producers=(("fc1", 1),),
    activation="activation_fn",
    consumer="fc2",
    width_key="ffn_dim",
    rotary=False,
    norms_first="do_layer_norm_before",
)


# Falcon: q, k, v in one linear, grouped by KV head; rotary positions.
#
# The stock attention of the new decoder architecture caches its keys and values once a query head;
# a narrowed one caches them once a KV head.


def falcon_project(attention: nn.Module, heads: HeadLayout) -> Projections:
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


def falcon_layout(heads: HeadLayout, config: Any, block: int) -> HeadLayout:
    """The count of KV heads has its own name, and in older models its own rules."""
    if config.new_decoder_architecture:
        return replace(heads, kv_heads=config.num_kv_heads)
    return replace(heads, kv_heads=1 if config.multi_query else heads.heads)


def falcon_refusal(config: Any) -> str | None:
    """ALiBi adds to the scores what NarrowAttention does not know."""
    if config.alibi:
        return "this Falcon has ALiBi positions (alibi), which are not served, only rotary ones"
    return None


FALCON = Anatomy(
    family="Falcon",
    model_types=("falcon",),
    blocks="h",
    attention="self_attention",
    project=falcon_project,
    producers=(("mlp.dense_h_to_4h", 1),),
    activation="mlp.act",
    consumer="mlp.dense_4h_to_h",
    width_key="ffn_hidden_size",
    rotary=True,
    layout=falcon_layout,
    outputs=2,
    refusal=falcon_refusal,
)
