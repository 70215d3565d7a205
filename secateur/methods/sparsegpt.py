"""SparseGPT: weights become zero column by column, and those to the right make up for them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.linalg.column_updates import Settle, inverse_factor, sweep
from secateur.linalg.masks import largest, largest_of_groups
from secateur.methods.form import Metric
from secateur.methods.sparse import SparseMethod
from secateur.structure.form import Form
from secateur.utils.options import option

COLUMNS = 128  #: chosen among, and updated, together

#: (first column, scores of some columns from there on) → mask of what stays of them
Chosen = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class SparseGPT(SparseMethod):
    """Set weights to zero column by column with the optimal brain surgeon, and refit the others.

    With H = E xxᵀ + λI and H⁻¹ = CᵀC, C upper triangular, a weight of column j scores w² / C_jj².
    The smallest of 128 columns (of each group of M, for N:M) go, and as column j is passed,

        e = w_j / C_jj where w_j goes, 0 elsewhere;   W_:,j: ← W_:,j: − e C_j,j:

    For column j, C_j,j: / C_jj is the row of the inverse of H over the columns from j on, which all
    rows share, so the weights that are left are refitted exactly but for those already passed.
    λ = ridge · mean of the diagonal; where that doesn't make H positive definite, it is raised with
    a warning, never replaced by another H. Each block is read behind the pruned blocks before it.
    Don't use it with little calibration data: the weights are refitted to it.

    Source: Frantar and Alistarh, "SparseGPT: Massive Language Models Can be Accurately Pruned in
    One-Shot", arXiv 2301.00774, section 3.
    """

    ridge: float = option(0.01, "ridge of H, relative to its mean diagonal", 0.0)

    name: ClassVar[str] = "sparsegpt"
    summary: ClassVar[str] = "sets weights to zero column by column and refits the remaining ones"
    source: ClassVar[str] = "arXiv 2301.00774"
    rereads: ClassVar[bool] = True

    def pruned(self, weight: Tensor, metric: Metric, form: Form) -> tuple[Tensor, Tensor]:
        factor = inverse_factor(metric.gram, self.ridge, "sparsegpt")
        if form.spec["form"] == "n_m":
            n, m = form.spec["n"], form.spec["m"]
            return swept(weight, factor, lambda _, scores: largest_of_groups(scores, n, m), m)
        count, inputs = form.spec["count"], weight.shape[1]

        def chosen(first: int, scores: Tensor) -> Tensor:
            last = first + scores.shape[1]
            own = count * last // inputs - count * first // inputs
            return largest(scores.flatten(), own).view_as(scores)

        return swept(weight, factor, chosen, COLUMNS)


def swept(weight: Tensor, factor: Tensor, chosen: Chosen, span: int) -> tuple[Tensor, Tensor]:
    """The weight after a sweep, and the mask of what stays, chosen for ``span`` columns at once."""
    mask, worth = torch.ones_like(weight, dtype=torch.bool), factor.diagonal() ** -2

    def begin(first: int, block: Tensor) -> Settle:
        kept, own = mask[:, first : first + block.shape[1]], worth[first:]

        def settle(i: int, block: Tensor) -> Tensor:
            if i % span == 0:
                ahead = slice(i, min(i + span, block.shape[1]))
                kept[:, ahead] = chosen(first + i, block[:, ahead].square() * own[ahead])
            return torch.where(kept[:, i], block[:, i], 0.0)

        return settle

    found = sweep(weight, factor, max(span, COLUMNS - COLUMNS % span), begin)
    return found, mask
