"""SparseGPT: weights become zero column by column, and those to the right make up for them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.linalg import damped_cholesky
from secateur.methods.form import Metric
from secateur.methods.sparse import SparseMethod, largest, largest_of_groups
from secateur.options import option
from secateur.units import Form

COLUMNS = 128  #: chosen among, and updated, together

#: (first column, scores of some columns from there on) → mask of what stays of them
Chosen = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class SparseGPT(SparseMethod):
    """Optimal brain surgeon over the weights of all rows at once, column by column.

    With H = E xxᵀ + λI and H⁻¹ = CᵀC, C upper triangular, a weight of column j scores w² / C_jj².
    The smallest of 128 columns (of each group of M, for N:M) go, and as column j is passed,

        e = w_j / C_jj where w_j goes, 0 elsewhere;   W_:,j: ← W_:,j: − e C_j,j:

    For column j, C_j,j: / C_jj is the row of the inverse of H over the columns from j on, which all
    rows share, so the weights that are left are refitted exactly but for those already passed.
    λ = ridge · mean of the diagonal; where that doesn't make H positive definite, it is raised with
    a warning, never replaced by another H. Each block is read behind the pruned blocks before it.
    Don't use it where calibration is short: the weights are refitted to it.

    Source: Frantar and Alistarh, "SparseGPT: Massive Language Models Can be Accurately Pruned in
    One-Shot", arXiv 2301.00774, section 3.
    """

    ridge: float = option(0.01, "on the diagonal of H, relative", 0.0)

    name: ClassVar[str] = "sparsegpt"
    summary: ClassVar[str] = "zeroes weights column by column, the others make up for them"
    source: ClassVar[str] = "arXiv 2301.00774"
    rereads: ClassVar[bool] = True

    def pruned(self, weight: Tensor, metric: Metric, form: Form) -> tuple[Tensor, Tensor]:
        factor = inverse_factor(metric.gram, self.ridge)
        if form.spec["form"] == "n_m":
            n, m = form.spec["n"], form.spec["m"]
            return swept(weight, factor, lambda _, scores: largest_of_groups(scores, n, m), m)
        count, inputs = form.spec["count"], weight.shape[1]

        def chosen(first: int, scores: Tensor) -> Tensor:
            last = first + scores.shape[1]
            own = count * last // inputs - count * first // inputs
            return largest(scores.flatten(), own).view_as(scores)

        return swept(weight, factor, chosen, COLUMNS)


def inverse_factor(gram: Tensor, ridge: float) -> Tensor:
    """Upper triangular C with CᵀC = (H + λI)⁻¹.

    From the Cholesky factor of H with its order reversed, so nothing is factorised that rounding
    may have made indefinite.
    """
    reverse, _ = damped_cholesky(gram.flip(0, 1), ridge, "sparsegpt")
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor: Tensor = torch.linalg.solve_triangular(reverse.flip(0, 1), eye, upper=True)
    return factor


def swept(weight: Tensor, factor: Tensor, chosen: Chosen, span: int) -> tuple[Tensor, Tensor]:
    """The weight after a sweep, and the mask of what stays, chosen for ``span`` columns at once."""
    weight, inputs = weight.clone(), weight.shape[1]
    mask = torch.ones_like(weight, dtype=torch.bool)
    width = max(span, COLUMNS - COLUMNS % span)
    for start in range(0, inputs, width):
        stop = min(start + width, inputs)
        part, kept, own = weight[:, start:stop], mask[:, start:stop], factor[start:stop, start:stop]
        errors = torch.zeros_like(part)
        for j in range(stop - start):
            if j % span == 0:
                ahead = slice(j, j + span)
                scores = (part[:, ahead] / own.diagonal()[ahead]).square()
                kept[:, ahead] = chosen(start + j, scores)
            errors[:, j] = torch.where(kept[:, j], 0.0, part[:, j] / own[j, j])
            part[:, j:] -= errors[:, j : j + 1] * own[j, j:]
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return weight * mask, mask
