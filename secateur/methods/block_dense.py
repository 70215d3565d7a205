"""BlockDense: low rank for every block of inputs by itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from secateur.layers.structured_secateur import BlockDense, Monarch
from secateur.methods.structured import StructuredMethod, undivided
from secateur.options import option

if TYPE_CHECKING:
    from secateur.model import Model


@dataclass(frozen=True)
class BlockDenseProjection(StructuredMethod):
    """A weight as D · blkdiag(B_1 … B_b), the truncated SVD of each of its b blocks of columns.

    The form lets every block have its own rank ρ map and nothing else, so that SVDs in the metric
    of a block's inputs are the whole projection; D then is fitted to the whole of H. Numbers are

        ρ (inputs + b · outputs)   of   outputs · inputs

    Don't use it where inputs of different blocks are much alike: ``svd-llm`` sees that.

    Source: Wei et al., "Building on Efficient Foundations: Effectively Training LLMs with
    Structured Feedforward Layers", arXiv 2406.16450, section 3.
    """

    blocks: int = option(4, "blocks of inputs", 1)
    rank_step: int = option(2, "ranks are multiples of this", 1)

    name: ClassVar[str] = "block-dense"
    summary: ClassVar[str] = "low rank for every block of inputs, by SVDs in their metric"
    source: ClassVar[str] = "arXiv 2406.16450"
    layers: ClassVar[type[Monarch]] = BlockDense

    def specs(self, outputs: int, inputs: int) -> Sequence[tuple[dict[str, int], str]]:
        """All ranks of a block below the break-even."""
        count = self.blocks
        most = (outputs * inputs - 1) // (inputs + count * outputs)
        ranks = range(self.rank_step, most + 1, self.rank_step)
        return [({"blocks": count, "rank": rank}, f"{count}× rank {rank}") for rank in ranks]

    def obstacle(self, model: "Model") -> str | None:
        """Say which numbers of blocks would do."""
        found = super().obstacle(model)
        return found and (undivided(self.units(model, 1), self.blocks, both=False) or found)
