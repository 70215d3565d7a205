"""GLM: gate and up in one linear, part of a head turns in pairs of neighbours."""

from dataclasses import replace
from typing import Any

from secateur.families.base import HeadLayout
from secateur.families.llama import LLAMA


def neighbours(heads: HeadLayout, config: Any, block: int) -> HeadLayout:
    """Pairs are neighbours, though the rotary tables are in halves."""
    return replace(heads, interleaved=True)


GLM = replace(
    LLAMA,
    family="GLM",
    model_types=("glm",),
    layout=neighbours,
    producers=(("mlp.gate_up_proj", 2),),
    activation="mlp.activation_fn",
)
GLM4 = replace(GLM, family="GLM-4", model_types=("glm4",), norms_behind=True)
