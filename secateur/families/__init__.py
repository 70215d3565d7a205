"""Model families as data: where blocks, attention and MLP of an architecture are.

A family is found by ``model_type``. Nothing here imports transformers, so that the families are
known while it is being imported. May import ``utils`` and ``layers``.
"""

from secateur.families.base import Anatomy, FeedForward, HeadLayout, Projection, Projections
from secateur.families.encoders import BERT, VIT
from secateur.families.gpt import FALCON, GPT2, GPT_NEOX, OPT
from secateur.families.llama_like import (
    COHERE,
    COHERE2,
    GEMMA,
    GEMMA2,
    GEMMA3,
    GLM,
    GLM4,
    LLAMA,
    OLMO,
    OLMO2,
    PHI3,
    QWEN2,
    QWEN3,
    STABLELM,
    STARCODER2,
)
from secateur.families.t5 import T5, T5_GATED

FAMILIES: tuple[Anatomy, ...] = (
    LLAMA,
    QWEN2,
    QWEN3,
    GEMMA,
    GEMMA2,
    GEMMA3,
    PHI3,
    STABLELM,
    COHERE,
    COHERE2,
    OLMO,
    OLMO2,
    GLM,
    GLM4,
    STARCODER2,
    FALCON,
    OPT,
    GPT2,
    GPT_NEOX,
    BERT,
    VIT,
    T5,
    T5_GATED,
)

__all__ = ["FAMILIES", "Anatomy", "FeedForward", "HeadLayout", "Projection", "Projections", "find"]


def find(model_type: str) -> Anatomy | None:
    """The first family of a ``model_type``, or None."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)
