"""AlphaPruning: blocks whose weight spectra have lighter tails are pruned more."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.allocate.base import BlockAllocator, poured
from secateur.calibration.needs import BlockStatistics, Need
from secateur.linalg.least_squares import energies
from secateur.models.block import Block
from secateur.utils.options import option

AROUND = (0.95, 1.5)  #: where the tail may begin, relative to the histogram's peak
NO_TAIL = 100.0  #: the exponent of a spectrum that has no tail


@dataclass(frozen=True)
class AlphaPruning(BlockAllocator):
    """Prune each block by the power-law exponent of its weight spectra.

    With λ the eigenvalues of WᵀW of a matrix in ascending order, and the tail beginning at the k-th
    of n,

        α = 1 + n_k / Σ_{i≥k} ln(λ_i / λ_k),   n_k = n − k + 1

    k is the one near the peak of the histogram of log λ at which the Kolmogorov-Smirnov distance of
    the tail to the power law is least. The mean α over a block's matrices, from the least to the
    largest of all blocks, is mapped to r_l from 1 − spread to 1 + spread, and the block loses

        φ_l = min(1, c · r_l),   c such that Σ w_l φ_l = 1 − keep

    where w_l is its share of the cost. If φ_l is capped, the other blocks lose more. Only weights
    are used, no calibration data. Don't use it if you have calibration data, or for matrices with
    only a few dozen rows, whose tails consist of a handful of eigenvalues.

    Source: Lu et al., "AlphaPruning", arXiv 2410.10912 (NeurIPS 2024), section 3.

    Attributes:
        spread: half the distance between the least and the largest ratio, before the cap.
    """

    spread: float = option(
        0.2, "largest deviation of a block's ratio from 1; 0 is uniform", 0.0, 0.99
    )

    name: ClassVar[str] = "alpha"
    summary: ClassVar[str] = "one share per block, by the power-law exponents of its weight spectra"
    source: ClassVar[str] = "arXiv 2410.10912"
    needs: ClassVar[frozenset[Need]] = frozenset()

    @property
    def reading(self) -> str:
        """The mean exponent."""
        return "alpha"

    def read(self, block: Block, statistics: BlockStatistics) -> tuple[float, ...]:
        """The mean exponent over all matrices of the block."""
        found = [hill(self.spectrum(matrix)) for matrix in block.matrices]
        return (math.fsum(found) / len(found),)

    def spectrum(self, weight: Tensor) -> Tensor:
        """Eigenvalues of WᵀW."""
        return energies(weight)

    def of_blocks(
        self, values: Sequence[float], weights: Sequence[float], keep: float
    ) -> list[float]:
        """1 − φ per block."""
        return [1 - phi for phi in self.sparsities(values, weights, 1 - keep)]

    def sparsities(
        self, exponents: Sequence[float], weights: Sequence[float], mean: float
    ) -> list[float]:
        """φ per block, with Σ w φ / Σ w = ``mean`` exactly."""
        low, high = min(exponents), max(exponents)
        way = [(a - low) / (high - low) if high > low else 0.5 for a in exponents]
        ratios = [1 - self.spread + 2 * self.spread * w for w in way]
        return poured([math.log(r) for r in ratios], weights, mean, 1.0)


def hill(eigenvalues: Tensor) -> float:
    """The exponent of the power law in the tail of positive numbers; zeros are left out."""
    found = eigenvalues[eigenvalues > 0].double().cpu().sort().values
    logs, best = found.log(), (math.inf, NO_TAIL)
    if len(found) < 3 or float(logs[-1] - logs[0]) < 1e-9:
        return NO_TAIL
    bins = math.ceil(2 * len(found) ** (1 / 3))  # Rice's rule
    peak = int(torch.histc(logs, bins).argmax())
    edge, width = float(logs[0]), float(logs[-1] - logs[0]) / bins
    low = edge + peak * width + math.log(AROUND[0])
    high = edge + peak * width + max(width, math.log(AROUND[1]))
    longest = len(logs) - max(3, math.isqrt(len(logs)))  # fewer would fit by chance
    first = min(int((logs < low).sum()), longest)
    last = min(int((logs <= high).sum()), longest + 1)
    for k in range(first, max(first + 1, last)):
        above = logs[k:] - logs[k]
        count = len(above)
        alpha = min(NO_TAIL, 1 + count / max(float(above.sum()), 1e-12))
        expected = 1 - (above * (1 - alpha)).exp()
        seen = torch.arange(count, dtype=above.dtype, device=above.device) / count
        best = min(best, (float((expected - seen).abs().max()), alpha))
    return best[1]
