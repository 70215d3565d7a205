"""Cohere's Command R: attention and MLP side by side, rotary pairs of neighbours."""

from dataclasses import replace
from typing import Any

from secateur.families.base import HeadLayout
from secateur.families.llama import LLAMA


def neighbours(heads: HeadLayout, config: Any, block: int) -> HeadLayout:
    """Pairs and rotary tables are interleaved."""
    return replace(heads, interleaved=True, doubled=True)


def neighbours_or_none(heads: HeadLayout, config: Any, block: int) -> HeadLayout:
    """Only blocks with a sliding window have positions."""
    sliding = config.layer_types[block] == "sliding_attention" and config.sliding_window is not None
    return neighbours(heads if sliding else replace(heads, rotary=0), config, block)


COHERE = replace(
    LLAMA, family="Cohere", model_types=("cohere",), layout=neighbours, head_norms="own"
)
COHERE2 = replace(LLAMA, family="Cohere 2", model_types=("cohere2",), layout=neighbours_or_none)
