"""MoDeGPT's allocation: blocks that change their input more are pruned less."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from secateur.allocate.base import BlockAllocator, poured
from secateur.structure.budget import Keep
from secateur.structure.costs import Prices
from secateur.structure.units import Unit
from secateur.utils.errors import InputError
from secateur.utils.options import option


@dataclass(frozen=True)
class EntropicInfluence(BlockAllocator):
    """Give each block one sparsity φ by its influence s, regularized by entropy.

    Maximising Σ w_l s_l (1 − φ_l) + ε H(φ) with mean φ fixed (w_l: the block's share of the
    whole price) gives

        φ_l = min(φ_max, c · exp(−s_l / ε)),   c such that Σ w_l φ_l = 1 − keep

    Without the cap that is the published L φ_avg softmax(−s/ε); what the cap cuts off is poured
    over the other blocks (water-filling), so the sum is exact. Don't use it if the units of a
    block differ in how sensitive they are: all of them get the share of the block.

    Source: arXiv 2408.09632, equation 10.

    Attributes:
        temperature: ε; a large one tends to uniform, a small one to whole blocks.
        max_sparsity: φ_max.
    """

    temperature: float = option(
        0.05, "temperature of the allocation over blocks; smaller is less even", 1e-4
    )
    max_sparsity: float = option(0.95, "largest share that a block can lose", 0.0, 1.0)

    name: ClassVar[str] = "influence"
    summary: ClassVar[str] = "one share per block, larger if the block changes its input more"
    source: ClassVar[str] = "arXiv 2408.09632, equation 10"

    def check(self, units: Sequence[Unit], prices: Prices, keep: Keep) -> None:
        """Refuse what the cap puts out of reach, too."""
        super().check(units, prices, keep)
        whole = prices.whole(units)
        floor = 1 - self.max_sparsity * (whole - prices.still(units)) / whole
        if not isinstance(keep, str) and keep < floor - 1e-12:
            raise InputError(
                f"keep {keep:.3f} is out of reach: no block may lose more than "
                f"{self.max_sparsity:g} of itself. Ask for at least {floor + 0.0005:.3f}, or raise "
                f"--max-sparsity."
            )

    def of_blocks(
        self, values: Sequence[float], weights: Sequence[float], keep: float
    ) -> list[float]:
        """1 − φ per block."""
        return [1 - phi for phi in self.sparsities(values, weights, 1 - keep)]

    def sparsities(
        self, influence: Sequence[float], weights: Sequence[float], mean: float
    ) -> list[float]:
        """φ per block, with Σ w φ / Σ w = ``mean`` exactly; ``mean`` is at most the cap."""
        logs = [-value / self.temperature for value in influence]
        return poured(logs, weights, mean, self.max_sparsity)
