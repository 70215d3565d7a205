"""Model families as data; one short file each.

Nothing here imports transformers, so that the families are known while it is being imported.
"""

from secateur.families.base import Anatomy, HeadLayout, Projection, Projections
from secateur.families.bert import BERT
from secateur.families.cohere import COHERE, COHERE2
from secateur.families.falcon import FALCON
from secateur.families.gemma import GEMMA, GEMMA2, GEMMA3
from secateur.families.glm import GLM, GLM4
from secateur.families.gpt2 import GPT2
from secateur.families.gpt_neox import GPT_NEOX
from secateur.families.llama import LLAMA
from secateur.families.olmo import OLMO, OLMO2
from secateur.families.opt import OPT
from secateur.families.phi3 import PHI3
from secateur.families.qwen import QWEN2, QWEN3
from secateur.families.stablelm import STABLELM
from secateur.families.starcoder2 import STARCODER2
from secateur.families.t5 import T5, T5_GATED
from secateur.families.vit import VIT

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

__all__ = ["FAMILIES", "Anatomy", "HeadLayout", "Projection", "Projections", "find"]


def find(model_type: str) -> Anatomy | None:
    """The first family of a ``model_type``, or None."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)
