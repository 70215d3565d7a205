"""StarCoder2: biases, LayerNorm, a plain MLP, rotary positions, a sliding window in some."""

from dataclasses import replace

from secateur.families.llama import LLAMA

STARCODER2 = replace(
    LLAMA,
    family="StarCoder2",
    model_types=("starcoder2",),
    producers=(("mlp.c_fc", 1),),
    activation="mlp.act",
    consumer="mlp.c_proj",
)
