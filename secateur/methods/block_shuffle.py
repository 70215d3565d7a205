"""BlockShuffle: two square-ish block-diagonal maps with a shuffle between."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from secateur.layers.structured_secateur import BlockShuffle, Monarch
from secateur.methods.structured import StructuredMethod
from secateur.utils.options import option


@dataclass(frozen=True)
class BlockShuffleProjection(StructuredMethod):
    """Monarch factors with a full inner dimension; the number of blocks determines the size.

    With w = min(outputs, inputs) and b blocks at both ends, numbers are

        w (outputs + inputs) / b   of   outputs · inputs

    and a slice has rank w / b², rounded either way by where the shuffle deals it. Don't use it
    if ``block-dense`` has a form of the same bytes, which the paper also finds better on text.

    Source: Wei et al., "Building on Efficient Foundations: Effectively Training LLMs with
    Structured Feedforward Layers", arXiv 2406.16450, section 3.
    """

    most_blocks: int = option(16, "maximum number of blocks", 2)

    name: ClassVar[str] = "block-shuffle"
    summary: ClassVar[str] = "Monarch factors with equal block counts and a full inner dimension"
    source: ClassVar[str] = "arXiv 2406.16450"
    layers: ClassVar[type[Monarch]] = BlockShuffle

    def specs(self, outputs: int, inputs: int) -> Sequence[tuple[dict[str, int], str]]:
        """All numbers of blocks that divide both ends."""
        common = math.gcd(outputs, inputs)
        counts = [b for b in range(2, self.most_blocks + 1) if common % b == 0]
        return [({"blocks": count}, f"{count} blocks") for count in counts]
