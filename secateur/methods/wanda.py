"""Wanda: weights that do least to what their row gives become zero."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.linalg.masks import largest, largest_of_groups
from secateur.methods.form import Metric
from secateur.methods.sparse import SparseMethod
from secateur.structure.form import Form


@dataclass(frozen=True)
class Wanda(SparseMethod):
    """Set the weights with the smallest magnitude times input norm to zero, equally many per row.

    With h_j = E x_j² the energy of input j, weights are ranked within a row, or a group of it, by

        s_ij = |W_ij| √h_j

    Of all masks that keep as many of every row, that is the one of least Σ (W − Ŵ)²_ij h_j, which
    is the output error of inputs that have nothing to do with each other. Each block is read behind
    the pruned blocks before it. Don't use it to remove more than about half of the weights, or for
    N:M: ``sparsegpt`` also refits the remaining weights.

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models",
    arXiv 2306.11695, section 3.
    """

    name: ClassVar[str] = "wanda"
    summary: ClassVar[str] = "sets weights with the smallest magnitude times input norm to zero"
    source: ClassVar[str] = "arXiv 2306.11695"
    rereads: ClassVar[bool] = True

    def pruned(self, weight: Tensor, metric: Metric, form: Form) -> tuple[Tensor, Tensor]:
        scores = weight.abs() * metric.energy.clamp_min(0).sqrt()
        if form.spec["form"] == "sparse":
            mask = largest(scores, form.spec["count"] // len(weight))
        else:
            mask = largest_of_groups(scores, form.spec["n"], form.spec["m"])
        return weight * mask, mask
