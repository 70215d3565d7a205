"""WeLore: plain low rank, with one threshold on singular values for the whole model."""

from dataclasses import dataclass
from typing import ClassVar

from secateur.allocate.base import Allocator
from secateur.allocate.welore import WeLore
from secateur.methods.svd import SVD


@dataclass(frozen=True)
class LowRankWeLore(SVD):
    """Low rank where singular values fall off fast, and dense weights where they don't.

    With σ̃ = (σ − min σ) / (max σ − min σ) of each matrix and one threshold k for all of them, found
    by bisection on the bytes, the rank is #(σ̃ ≥ k). A matrix whose factors would be no smaller
    stays dense. The plan records which become low rank (the paper's LRCs, which are those to tune
    afterwards) and which stay. Weights only; don't use it where there is text to calibrate on.

    Source: Jaiswal et al., "From GaLore to WeLore", arXiv 2407.11239.
    """

    name: ClassVar[str] = "welore"
    summary: ClassVar[str] = "low rank where singular values fall off fast, dense elsewhere"
    source: ClassVar[str] = "arXiv 2407.11239"

    @property
    def allocator(self) -> Allocator:
        """The threshold."""
        return WeLore()
