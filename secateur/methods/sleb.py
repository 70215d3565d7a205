"""SLEB: whole blocks go one by one, each judged by the model without it."""

from dataclasses import dataclass
from typing import ClassVar

from secateur.allocate.base import Allocator
from secateur.allocate.greedy import Greedy
from secateur.methods.shortgpt import ShortGPT


@dataclass(frozen=True)
class SLEB(ShortGPT):
    """Remove whole blocks by a greedy search on the output of the model.

    With R the blocks that are gone and D(R) what the model without them loses on calibration text,

        R ← R ∪ {argmin_l D(R ∪ {l})}

    so that of two blocks that are redundant with each other one remains. D is the KL divergence
    from the dense model; the paper uses perplexity. Don't use it if there are many blocks and time
    is short: ShortGPT needs one pass. Neither refits the remaining weights.

    Source: Song et al., "SLEB: Streamlining LLMs through Redundancy Verification and Elimination of
    Transformer Blocks", arXiv 2402.09025, algorithm 1.
    """

    name: ClassVar[str] = "sleb"
    summary: ClassVar[str] = (
        "removes blocks greedily, each time the one that changes the output least"
    )
    source: ClassVar[str] = "arXiv 2402.09025"

    @property
    def allocator(self) -> Allocator:
        """One by one."""
        return Greedy()
