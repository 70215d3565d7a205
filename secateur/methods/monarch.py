"""Monarch: block-diagonal, shuffled, block-diagonal."""

from dataclasses import dataclass
from typing import ClassVar

from secateur.layers.structured_secateur import Monarch
from secateur.methods.structured import RankedBlocks


@dataclass(frozen=True)
class MonarchProjection(RankedBlocks):
    """Replace a weight by two block-diagonal factors with a permutation between them.

    A weight is cut into b × b slices, neighbouring inputs by every b-th output, and each slice
    becomes a matrix of rank ρ (1 in the paper), by an SVD in the metric of its inputs. Numbers are

        ρ b (outputs + inputs)   of   outputs · inputs

    Fourier, Hadamard and Kronecker products are of this form. Don't use it without
    fine-tuning: ``svd-llm`` with rank ρ b takes as many bytes and mostly loses less.

    Source: Dao et al., "Monarch: Expressive Structured Matrices for Efficient and Accurate
    Training", arXiv 2204.00595, section 3 and its projection.
    """

    name: ClassVar[str] = "monarch"
    summary: ClassVar[str] = (
        "two block-diagonal factors with a permutation between, by SVDs of slices"
    )
    source: ClassVar[str] = "arXiv 2204.00595"
    layers: ClassVar[type[Monarch]] = Monarch
    cuts_outputs: ClassVar[bool] = True

    def most(self, outputs: int, inputs: int) -> int:
        return (outputs * inputs - 1) // (self.blocks * (outputs + inputs))

    def of_rank(self, rank: int) -> tuple[dict[str, int], str]:
        numbers = {"in_blocks": self.blocks, "out_blocks": self.blocks, "rank": rank}
        return numbers, f"{self.blocks}×{self.blocks} rank {rank}"
