"""Kinds of models by what they are used for, one short file each."""

from typing import Any

from secateur.data.tasks.base import Use
from secateur.data.tasks.causal import CausalLM
from secateur.data.tasks.images import ImageClassification
from secateur.data.tasks.masked import MaskedLM
from secateur.data.tasks.seq2seq import Seq2SeqLM
from secateur.families import find

PREFIX = "secateur_"  #: of the model_type of compressed checkpoints

__all__ = ["CausalLM", "ImageClassification", "MaskedLM", "Seq2SeqLM", "Use", "use_of"]


def use_of(config: Any) -> Use:
    """The use of a model by its config; a causal language model for unknown families."""
    family = find(config.model_type.removeprefix(PREFIX))
    kind = "causal" if family is None else family.use
    if kind == "masked":
        return MaskedLM()
    if kind == "seq2seq":
        return Seq2SeqLM(start=getattr(config, "decoder_start_token_id", None) or 0)
    if kind == "images":
        side, patch = (_pair(size) for size in (config.image_size, config.patch_size))
        patches = (side[0] // patch[0]) * (side[1] // patch[1])
        classes = {str(name): int(number) for name, number in config.label2id.items()}
        return ImageClassification(patches + 1, (config.num_channels, *side), classes)
    return CausalLM()


def _pair(size: Any) -> tuple[int, int]:
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return height, width
