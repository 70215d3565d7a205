"""Families of Llama's shape: separate or fused projections, a gated MLP, rotary positions.

Where a family differs from Llama, its entry says in what.
"""

from dataclasses import replace
from typing import Any

from torch import nn

from secateur.families.base import Anatomy, HeadLayout, Projections, linear, separate, split

# Llama and Mistral: four attention linears, gated MLP, rotary positions.

LLAMA = Anatomy(
    family="Llama / Mistral",
    model_types=("llama", "mistral"),
    blocks="layers",
    attention="self_attn",
    project=separate("q_proj", "k_proj", "v_proj", "o_proj"),
    producers=(("mlp.gate_proj", 1), ("mlp.up_proj", 1)),
    activation="mlp.act_fn",
    consumer="mlp.down_proj",
    width_key="intermediate_size",
    rotary=True,
)


# Qwen2 (biases on q, k, v) and Qwen3 (norms inside the heads): Llama's shape otherwise.

QWEN2 = replace(LLAMA, family="Qwen2", model_types=("qwen2",))
QWEN3 = replace(LLAMA, family="Qwen3", model_types=("qwen3",))


# Gemma: Llama's shape with norms by 1 + w; since 2 with norms behind attention and MLP too.


def gemma_refusal(config: Any) -> str | None:
    """Encoders made of Gemma read to both sides."""
    if getattr(config, "use_bidirectional_attention", None):
        return "this model attends to both sides (use_bidirectional_attention), which is not served"
    return None


GEMMA = replace(LLAMA, family="Gemma", model_types=("gemma",), refusal=gemma_refusal)
GEMMA2 = replace(
    GEMMA,
    family="Gemma 2",
    model_types=("gemma2",),
    norms_behind=True,
    soft_cap="attn_logit_softcapping",
)
GEMMA3 = replace(  # its config has a cap for scores, but its attention has not
    GEMMA, family="Gemma 3 (text)", model_types=("gemma3_text",), norms_behind=True
)


# Phi-3: query, key and value in one linear, gate and up in another.


def phi3_project(attention: nn.Module, heads: HeadLayout) -> Projections:
    """The fused linear holds all queries, then all keys, then all values."""
    kv = heads.kv_heads * heads.width
    fused = linear(attention.get_submodule("qkv_proj"))
    q, k, v = split(fused, heads.heads * heads.width, kv, kv)
    return Projections(q, k, v, linear(attention.get_submodule("o_proj")))


PHI3 = Anatomy(
    family="Phi-3",
    model_types=("phi3",),
    blocks="layers",
    attention="self_attn",
    project=phi3_project,
    producers=(("mlp.gate_up_proj", 2),),
    activation="mlp.activation_fn",
    consumer="mlp.down_proj",
    width_key="intermediate_size",
    rotary=True,
)


# OLMo: Llama's shape; OLMo 2 has norms behind attention and MLP, and over all heads together.


def olmo_refusal(config: Any) -> str | None:
    """Clipped values are no linear map of what comes in."""
    if getattr(config, "clip_qkv", None) is not None:
        return "this OLMo clips queries, keys and values (clip_qkv), which is not served"
    return None


OLMO = replace(LLAMA, family="OLMo", model_types=("olmo",), refusal=olmo_refusal)
OLMO2 = replace(
    LLAMA, family="OLMo 2", model_types=("olmo2",), norms_behind=True, head_norms="joint"
)


# GLM: gate and up in one linear, part of a head turns in pairs of neighbours.


def glm_layout(heads: HeadLayout, config: Any, block: int) -> HeadLayout:
    """Pairs are glm_layout, though the rotary tables are in halves."""
    return replace(heads, interleaved=True)


GLM = replace(
    LLAMA,
    family="GLM",
    model_types=("glm",),
    layout=glm_layout,
    producers=(("mlp.gate_up_proj", 2),),
    activation="mlp.activation_fn",
)
GLM4 = replace(GLM, family="GLM-4", model_types=("glm4",), norms_behind=True)


# Cohere's Command R: attention and MLP side by side, rotary pairs of neighbours.


def cohere_layout(heads: HeadLayout, config: Any, block: int) -> HeadLayout:
    """Pairs and rotary tables are interleaved."""
    return replace(heads, interleaved=True, doubled=True)


def cohere2_layout(heads: HeadLayout, config: Any, block: int) -> HeadLayout:
    """Only blocks with a sliding window have positions."""
    sliding = config.layer_types[block] == "sliding_attention" and config.sliding_window is not None
    return cohere_layout(heads if sliding else replace(heads, rotary=0), config, block)


COHERE = replace(
    LLAMA, family="Cohere", model_types=("cohere",), layout=cohere_layout, head_norms="own"
)
COHERE2 = replace(LLAMA, family="Cohere 2", model_types=("cohere2",), layout=cohere2_layout)


# StableLM: Llama's shape, partial rotary positions, a list of norms inside the heads or none.

STABLELM = replace(LLAMA, family="StableLM", model_types=("stablelm",), head_norms="list")


# StarCoder2: biases, LayerNorm, a plain MLP, rotary positions, a sliding window in some.

STARCODER2 = replace(
    LLAMA,
    family="StarCoder2",
    model_types=("starcoder2",),
    producers=(("mlp.c_fc", 1),),
    activation="mlp.act",
    consumer="mlp.c_proj",
)
