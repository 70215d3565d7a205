"""Plain low rank: the truncated singular value decomposition of every matrix."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.methods.form import FormMethod, Metric
from secateur.structure.form import Form
from secateur.structure.parametrizations import form_of
from secateur.utils.options import option


@dataclass(frozen=True)
class SVD(FormMethod):
    """Replace a weight by its best low-rank approximation, independent of the inputs.

    With W = Σ σ_i u_i v_iᵀ,

        Ŵ = (U_r Σ_r^½) (Σ_r^½ V_rᵀ),   ‖W − Ŵ‖² = Σ_{i>r} σ_i²

    A rank pays below outputs · inputs / (outputs + inputs), half of a square matrix; ranks above it
    are not offered. Don't use it if you have calibration data: on these, the outputs of ``svd-llm``
    are never worse.

    Source: Eckart and Young, 1936.
    """

    rank_step: int = option(8, "ranks are multiples of this number", 1)

    name: ClassVar[str] = "svd"
    summary: ClassVar[str] = "low-rank factors by truncated SVD of the weights"
    source: ClassVar[str] = "Eckart-Young"
    data_aware: ClassVar[bool] = False

    def forms(self, outputs: int, inputs: int, bias: bool) -> Sequence[Form]:
        """All ranks below the break-even."""
        most = (outputs * inputs - 1) // (outputs + inputs)
        common = {"form": "low_rank", "outputs": outputs, "inputs": inputs, "bias": bias}
        ranks = range(self.rank_step, most + 1, self.rank_step)
        return [form_of({**common, "rank": rank}, f"rank {rank}") for rank in ranks]

    def reshaped(self, weight: Tensor, metric: Metric, form: Form) -> dict[str, Tensor]:
        """The two factors, of equal size."""
        root, inverse = metric.whitening
        left, values, right = torch.linalg.svd(weight @ root, full_matrices=False)
        rank = form.spec["rank"]
        share = values[:rank].sqrt()
        return {
            "first.weight": share.unsqueeze(1) * right[:rank] @ inverse,
            "second.weight": left[:, :rank] * share,
        }

    def errors(
        self, weight: Tensor, metric: Metric, forms: Sequence[Form], judged: Metric | None = None
    ) -> list[float]:
        """The discarded energies, in another metric G each times (vᵀL⁻¹) G (vᵀL⁻¹)ᵀ."""
        root, inverse = metric.whitening
        if judged is None:
            energies = torch.linalg.svdvals(weight @ root).square()
        else:
            _, values, right = torch.linalg.svd(weight @ root, full_matrices=False)
            rows = right @ inverse
            energies = values.square() * ((rows @ judged.gram) * rows).sum(1)
        return [float(energies[form.spec["rank"] :].sum()) for form in forms]
