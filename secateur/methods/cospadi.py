"""CoSpaDi: a dictionary and sparse codes by K-SVD."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from secateur.linalg.sparse_coding import in_turns, updated_atoms
from secateur.methods.dictionary import DictionaryMethod
from secateur.utils.options import option


@dataclass(frozen=True)
class CoSpaDi(DictionaryMethod):
    """Approximate weights by a dictionary with sparse codes, by K-SVD on whitened rows Y = W L.

    In turns, rows are coded anew by orthogonal matching pursuit, each keeping its old code where
    that is better, and every atom a with its coefficients becomes the best rank one fit of what
    the rows that use it lack without it:

        E = Y_R − C_R A + c_R aᵀ,   a ← first right singular vector of E,   c_R ← E a

    So the error never rises, and the last state is the best. Rounds end where one gains nothing.
    Try ``compot`` and ``dsformer`` first, which are much cheaper. Don't use it for speed: layers
    compute with the dense weight.

    Source: "CoSpaDi: Compressing LLMs via Calibration-Guided Sparse Dictionary Learning", arXiv
    2509.22075.
    """

    powers: int = option(2, "power iterations per atom", 1)

    name: ClassVar[str] = "cospadi"
    summary: ClassVar[str] = "dictionary with sparse codes by K-SVD, activation-weighted"
    source: ClassVar[str] = "arXiv 2509.22075"

    def coded(self, signals: Tensor, atoms: int, nonzeros: int) -> tuple[Tensor, Tensor]:
        """K-SVD from atoms that are rows of the weight."""
        update = partial(updated_atoms, powers=self.powers)
        return in_turns(signals, atoms, nonzeros, self.sweeps, update)
