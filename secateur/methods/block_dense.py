"""BlockDense: low rank for every block of inputs by itself."""

from dataclasses import dataclass
from typing import ClassVar

from secateur.layers.structured_secateur import BlockDense, Monarch
from secateur.methods.structured import RankedBlocks


@dataclass(frozen=True)
class BlockDenseProjection(RankedBlocks):
    """Replace a weight by D · blkdiag(B_1 … B_b), from truncated SVDs of its b blocks of columns.

    The form lets every block have its own rank ρ map and nothing else, so that SVDs in the metric
    of a block's inputs are the whole projection; D then is fitted to the whole of H. Numbers are

        ρ (inputs + b · outputs)   of   outputs · inputs

    Don't use it if inputs of different blocks are strongly correlated; ``svd-llm`` exploits that.

    Source: Wei et al., "Building on Efficient Foundations: Effectively Training LLMs with
    Structured Feedforward Layers", arXiv 2406.16450, section 3.
    """

    name: ClassVar[str] = "block-dense"
    summary: ClassVar[str] = "one low-rank factor per block of inputs, by activation-weighted SVD"
    source: ClassVar[str] = "arXiv 2406.16450"
    layers: ClassVar[type[Monarch]] = BlockDense
    cuts_outputs: ClassVar[bool] = False

    def most(self, outputs: int, inputs: int) -> int:
        return (outputs * inputs - 1) // (inputs + self.blocks * outputs)

    def of_rank(self, rank: int) -> tuple[dict[str, int], str]:
        return {"blocks": self.blocks, "rank": rank}, f"{self.blocks}× rank {rank}"
