"""SLEB: whole blocks go one by one, each judged by the model without it."""

from dataclasses import dataclass
from typing import ClassVar

from secateur.allocate.base import Allocator
from secateur.allocate.greedy import Greedy
from secateur.methods.shortgpt import ShortGPT


@dataclass(frozen=True)
class SLEB(ShortGPT):
    """Depth pruning by search: the blocks are those of ShortGPT, the choice is greedy.

    With R the blocks that are gone and D(R) what the model without them loses on calibration text,

        R ← R ∪ {argmin_l D(R ∪ {l})}

    so that of two blocks that stand in for one another one stays. D is the divergence from the
    dense model where the paper has perplexity. Don't use it where blocks are many and time is
    short: ShortGPT needs one pass. Neither makes up for what is gone.

    Source: Song et al., "SLEB: Streamlining LLMs through Redundancy Verification and Elimination of
    Transformer Blocks", arXiv 2402.09025, algorithm 1.
    """

    name: ClassVar[str] = "sleb"
    summary: ClassVar[str] = "whole blocks, each time the one that the model misses least"
    source: ClassVar[str] = "arXiv 2402.09025"

    @property
    def allocator(self) -> Allocator:
        """One by one."""
        return Greedy()
