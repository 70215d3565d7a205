"""Model families as data; one short file each.

Nothing here imports transformers, so that the families are known while it is being imported.
"""

from secateur.anatomy.base import Anatomy, HeadLayout, Projection, Projections
from secateur.anatomy.gpt2 import GPT2
from secateur.anatomy.gpt_neox import GPT_NEOX
from secateur.anatomy.llama import LLAMA
from secateur.anatomy.opt import OPT
from secateur.anatomy.phi3 import PHI3
from secateur.anatomy.qwen import QWEN2, QWEN3

FAMILIES: tuple[Anatomy, ...] = (LLAMA, QWEN2, QWEN3, PHI3, OPT, GPT2, GPT_NEOX)

__all__ = ["FAMILIES", "Anatomy", "HeadLayout", "Projection", "Projections", "find"]


def find(model_type: str) -> Anatomy | None:
    """The family that serves ``model_type``, or None."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)
