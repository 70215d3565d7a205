"""Columns of a weight changed one after the other, each error made good by the columns behind it.

Changing column j of W (outputs, inputs) by e, with the columns behind it free, costs ‖e‖² r_j² in
E‖ΔW x‖² once these are at their best, and with H = E xxᵀ = R Rᵀ, R upper triangular, U = R⁻¹,

    w_k ← w_k − e U_jk / U_jj   for k > j,     r_j = R_jj = 1 / U_jj

whatever the columns before j became. Over a whole sweep the costs add up, exactly.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from secateur.linalg import damped_cholesky

#: from the index of a column in its block, and the block as it stands, what the column becomes
Settle = Callable[[int, Tensor], Tensor]


def feedback(gram: Tensor, ridge: float, what: str) -> tuple[Tensor, Tensor]:
    """The rows U_j / U_jj, a unit upper triangle, and r_j² of every column.

    A Gram that is not positive definite has its ridge raised, with a DampingWarning: there is no
    sweep without feedback that goes by the same name.
    """
    lower, _ = damped_cholesky(gram.flip(0, 1), ridge, what)
    upper = lower.flip(0, 1)
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    inverse = torch.linalg.solve_triangular(upper, eye, upper=True)
    diagonal = upper.diagonal()
    return diagonal.unsqueeze(1) * inverse, diagonal.square()


def sweep(
    weight: Tensor, rows: Tensor, width: int, begin: Callable[[int, Tensor], Settle]
) -> Tensor:
    """The weight that a sweep in blocks of ``width`` columns leaves; ``rows`` of :func:`feedback`.

    ``begin`` is given the first column of each block and the block, with all errors before it made
    good, and gives what settles its columns.
    """
    current, found = weight.clone(), torch.empty_like(weight)
    for first in range(0, weight.shape[1], width):
        block = current[:, first : first + width]  # a view
        last = first + block.shape[1]
        settle, errors = begin(first, block), torch.empty_like(block)
        for i in range(last - first):
            column = settle(i, block)
            errors[:, i] = block[:, i] - column
            found[:, first + i] = column
            block[:, i + 1 :] -= torch.outer(errors[:, i], rows[first + i, first + i + 1 : last])
        current[:, last:] -= errors @ rows[first:last, last:]
    return found
