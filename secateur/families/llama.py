"""Llama and Mistral: four attention linears, gated MLP, rotary positions."""

from secateur.families.base import Anatomy, separate

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
