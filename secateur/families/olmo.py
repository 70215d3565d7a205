"""OLMo: Llama's shape; OLMo 2 has norms behind attention and MLP, and over all heads together."""

from dataclasses import replace
from typing import Any

from secateur.families.llama import LLAMA


def unclipped(config: Any) -> str | None:
    """Clipped values are no linear map of what comes in."""
    if getattr(config, "clip_qkv", None) is not None:
        return "this OLMo clips queries, keys and values (clip_qkv), which is not served"
    return None


OLMO = replace(LLAMA, family="OLMo", model_types=("olmo",), refusal=unclipped)
OLMO2 = replace(
    LLAMA, family="OLMo 2", model_types=("olmo2",), norms_behind=True, head_norms="joint"
)
