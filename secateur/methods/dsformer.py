"""DSFormer: blocks of a weight as small dense bases times codes of a fixed number of entries."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from secateur.linalg.sparse_coding import fitted_atoms, in_turns
from secateur.methods.dictionary import DictionaryMethod, stored
from secateur.methods.form import Metric
from secateur.methods.structured import undivided
from secateur.structure.form import Form
from secateur.utils.options import option

if TYPE_CHECKING:
    from secateur.models.model import Model


@dataclass(frozen=True)
class DSFormer(DictionaryMethod):
    """Give each block of columns a small basis, in which each row has s coefficients.

    In a block, supports come from matching pursuit, kept where the old ones are better, and bases
    from least squares: with codes C, A = C⁺ Y. Blocks follow one another, and each makes good what
    those before it have lost. With E = W − Ŵ so far, the error is least in block j where

        Ŵ_j is near W_j + E_{<j} H_{<j,j} H_jj⁻¹   in the metric of H_jj

    The paper trains through the factors, W as a proxy; that is not done here. Don't use it for
    speed: layers compute with the dense weight.

    Source: Chand et al., "DSFormer: Effective Compression of Text-Transformers by Dense-Sparse
    Weight Factorization", arXiv 2312.13211.
    """

    blocks: int = option(4, "number of blocks of inputs", 1)

    name: ClassVar[str] = "dsformer"
    summary: ClassVar[str] = "small dense bases with sparse codes, one per block of inputs"
    source: ClassVar[str] = "arXiv 2312.13211"

    @property
    def parts(self) -> int:
        return self.blocks

    def obstacle(self, model: "Model") -> str | None:
        """Say which numbers of blocks would do."""
        found = super().obstacle(model)
        return found and (undivided(self.units(model, 1), self.blocks, both=False) or found)

    def reshaped(self, weight: Tensor, metric: Metric, form: Form) -> dict[str, Tensor]:
        """Block after block."""
        spec, width = dict(form.spec), weight.shape[1] // self.blocks
        lost, codes, bases = torch.zeros_like(weight), [], []
        for start in range(0, weight.shape[1], width):
            part = slice(start, start + width)
            root, inverse = Metric(metric.damped[part, part]).whitening
            toward = weight[:, part] + lost @ metric.damped[:, part] @ inverse.mT @ inverse
            code, basis = self.coded(toward @ root, spec["atoms"], spec["nonzeros"])
            basis = basis @ inverse
            lost[:, part] = weight[:, part] - code @ basis
            codes.append(code)
            bases.append(basis)
        return stored(spec, torch.stack(codes), torch.stack(bases))

    def coded(self, signals: Tensor, atoms: int, nonzeros: int) -> tuple[Tensor, Tensor]:
        """Supports and least squares in turns."""
        return in_turns(signals, atoms, nonzeros, self.sweeps, fitted_atoms)
