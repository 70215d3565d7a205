"""COMPOT: an orthonormal dictionary and the largest entries of what it makes of a weight."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.linalg.sparse_coding import orthonormal_dictionary
from secateur.methods.dictionary import DictionaryMethod
from secateur.utils.options import option


@dataclass(frozen=True)
class COMPOT(DictionaryMethod):
    """Approximate weights by sparse codes in an orthonormal dictionary, by exact alternating steps.

    With Y = W L whitened by H = L Lᵀ and A Aᵀ = I, there are at most as many atoms as inputs, and

        C = the s largest of Y Aᵀ in every row,   A = U Vᵀ from Cᵀ Y = U Σ Vᵀ

    so that the error never rises. Each iteration takes one SVD. The paper's allocation is left out,
    as any allocator can be used. Don't use it for speed: layers compute with the dense weight.

    Source: COMPOT, arXiv 2602.15200.
    """

    sweeps: int = option(20, "iterations of the solver", 1)

    name: ClassVar[str] = "compot"
    summary: ClassVar[str] = "orthonormal dictionary with sparse codes, activation-weighted"
    source: ClassVar[str] = "arXiv 2602.15200"

    def most(self, outputs: int, inputs: int) -> int:
        """No more atoms than there are right angles."""
        return min(outputs, inputs)

    def coded(self, signals: Tensor, atoms: int, nonzeros: int) -> tuple[Tensor, Tensor]:
        """Both steps in turns."""
        return orthonormal_dictionary(signals, atoms, nonzeros, self.sweeps)
