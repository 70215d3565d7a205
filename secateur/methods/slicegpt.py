"""SliceGPT: the residual stream in the basis of its principal directions, and fewer of them."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.allocate.base import Allocator
from secateur.allocate.uniform import Uniform
from secateur.calibration.needs import BlockStatistics, Need, Needs
from secateur.linalg.least_squares import tails
from secateur.methods.base import Method, Solution
from secateur.models.block import Block
from secateur.structure.error_curve import Curve
from secateur.structure.narrowing import Narrowing
from secateur.structure.units import STREAM, Unit
from secateur.utils.errors import InputError, nearest, shown
from secateur.utils.options import option

ORIENTATIONS = ("random", "pca")


@dataclass(frozen=True)
class SliceGPT(Method):
    """Reduce the hidden size of all blocks by PCA after every attention and MLP.

    With x the stream at one place, C = E xᵀx over all tokens and E its first k eigenvectors,

        x ← x E,   W_in ← Eᵀ diag(γ) W_in,   W_out ← W_out E',   shortcut Eᵀ E'
        lost: Σ_{i>k} λ_i

    where E' is of the next place; an RMS norm says the same in any orthonormal basis. C is read
    behind what is sliced already. The damping of C that is published adds to all λ alike and
    changes no eigenvector, so there is none here.

    Every block gains two k × k matrices. Don't use it for a small reduction: if a block has 12 d²
    parameters, the first 13 % of the residual stream only pay for these matrices.

    Source: Ashkboos et al., "SliceGPT: Compress Large Language Models by Deleting Rows and
    Columns", arXiv 2401.15024, sections 3.2 to 3.4.
    """

    orientation: str = option("random", "basis of the kept directions: random, or pca (by energy)")
    orientation_seed: int = option(0, "seed of the random basis", 0)

    name: ClassVar[str] = "slicegpt"
    summary: ClassVar[str] = "rotates the residual stream to principal components and removes some"
    source: ClassVar[str] = "arXiv 2401.15024"
    curve: ClassVar[str] = "lost energy: share of the residual stream's energy, mean over places"
    needs: ClassVar[frozenset[Need]] = frozenset({Needs.BETWEEN_GRAM, Needs.BEHIND_GRAM})
    kinds: ClassVar[tuple[str, ...]] = STREAM

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.orientation not in ORIENTATIONS:
            known = nearest(self.orientation, ORIENTATIONS)
            raise InputError(f"unknown --orientation {shown(self.orientation)}. {known}")

    @property
    def allocator(self) -> Allocator:
        """There is one size: the largest that fits."""
        return Uniform()

    def solve(self, unit: Unit, block: Block, statistics: BlockStatistics) -> Solution:
        """The stream at one place, whose Gram is all of ``statistics``."""
        (stream,) = statistics.values()
        values, vectors = torch.linalg.eigh(stream.mean)
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)

        def at(size: int) -> Narrowing:
            kept = vectors[:, :size]
            return Narrowing(encode=kept @ self._mix(size).to(kept))

        return Solution(Curve.of(tails(values)), at)

    def _mix(self, size: int) -> Tensor:
        """A rotation of the kept directions, the same at every place; it changes no output.

        It evens out the coordinates, of which the first would otherwise be far larger.
        """
        if self.orientation == "pca":
            return torch.eye(size, dtype=torch.float64)
        generator = torch.Generator().manual_seed(self.orientation_seed)
        mix: Tensor = torch.linalg.qr(
            torch.randn(size, size, generator=generator, dtype=torch.float64)
        ).Q
        return mix
