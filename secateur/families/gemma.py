"""Gemma: Llama's shape with norms by 1 + w; since 2 with norms behind attention and MLP too."""

from dataclasses import replace
from typing import Any

from secateur.families.llama import LLAMA


def causal_only(config: Any) -> str | None:
    """Encoders made of Gemma read to both sides."""
    if getattr(config, "use_bidirectional_attention", None):
        return "this model attends to both sides (use_bidirectional_attention), which is not served"
    return None


GEMMA = replace(LLAMA, family="Gemma", model_types=("gemma",), refusal=causal_only)
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
