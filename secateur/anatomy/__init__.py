"""Model families as data; one short file each.

Nothing here imports transformers, so that the families are known while it is being imported.
"""

from secateur.anatomy.base import Anatomy, HeadLayout, Projection, Projections
from secateur.anatomy.bert import BERT
from secateur.anatomy.cohere import COHERE, COHERE2
from secateur.anatomy.falcon import FALCON
from secateur.anatomy.gemma import GEMMA, GEMMA2, GEMMA3
from secateur.anatomy.glm import GLM, GLM4
from secateur.anatomy.gpt2 import GPT2
from secateur.anatomy.gpt_neox import GPT_NEOX
from secateur.anatomy.llama import LLAMA
from secateur.anatomy.olmo import OLMO, OLMO2
from secateur.anatomy.opt import OPT
from secateur.anatomy.phi3 import PHI3
from secateur.anatomy.qwen import QWEN2, QWEN3
from secateur.anatomy.stablelm import STABLELM
from secateur.anatomy.starcoder2 import STARCODER2
from secateur.anatomy.t5 import T5, T5_GATED
from secateur.anatomy.vit import VIT

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
