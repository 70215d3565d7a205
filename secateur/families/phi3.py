"""Phi-3: query, key and value in one linear, gate and up in another."""

from torch import nn

from secateur.families.base import Anatomy, HeadLayout, Projections, linear, split


def project(attention: nn.Module, heads: HeadLayout) -> Projections:
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
    project=project,
    producers=(("mlp.gate_up_proj", 2),),
    activation="mlp.activation_fn",
    consumer="mlp.down_proj",
    width_key="intermediate_size",
    rotary=True,
)
