"""Monarch: block-diagonal, shuffled, block-diagonal."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from secateur.layers.structured_secateur import Monarch
from secateur.methods.structured import StructuredMethod, undivided
from secateur.options import option

if TYPE_CHECKING:
    from secateur.model import Model


@dataclass(frozen=True)
class MonarchProjection(StructuredMethod):
    """The nearest product of two block-diagonal matrices with a permutation between.

    A weight is cut into b × b slices, neighbouring inputs by every b-th output, and each slice
    becomes a matrix of rank ρ (1 in the paper), by an SVD in the metric of its inputs. Numbers are

        ρ b (outputs + inputs)   of   outputs · inputs

    Fourier, Hadamard and Kronecker products are of this form. Don't use it for a trained model as
    it is: ``svd-llm`` with rank ρ b takes as many bytes and mostly loses less.

    Source: Dao et al., "Monarch: Expressive Structured Matrices for Efficient and Accurate
    Training", arXiv 2204.00595, section 3 and its projection.
    """

    blocks: int = option(4, "blocks of inputs, and of outputs", 1)
    rank_step: int = option(2, "ranks are multiples of this", 1)

    name: ClassVar[str] = "monarch"
    summary: ClassVar[str] = "two block-diagonal factors with a shuffle between, by SVDs of slices"
    source: ClassVar[str] = "arXiv 2204.00595"
    layers: ClassVar[type[Monarch]] = Monarch

    def specs(self, outputs: int, inputs: int) -> Sequence[tuple[dict[str, int], str]]:
        """All ranks of a slice below the break-even."""
        count = self.blocks
        most = (outputs * inputs - 1) // (count * (outputs + inputs))
        blocks = {"in_blocks": count, "out_blocks": count}
        ranks = range(self.rank_step, most + 1, self.rank_step)
        return [({**blocks, "rank": rank}, f"{count}×{count} rank {rank}") for rank in ranks]

    def obstacle(self, model: "Model") -> str | None:
        """Say which numbers of blocks would do."""
        found = super().obstacle(model)
        return found and (undivided(self.units(model, 1), self.blocks, both=True) or found)
