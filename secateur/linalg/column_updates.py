"""Columns of a weight changed one after the other, each error made good by the columns behind it.

With (H + λI)⁻¹ = CᵀC, C upper triangular, and H = E xxᵀ, a column j of W (outputs, inputs) that
changes by −e while those behind it are free costs ‖e‖² / C_jj² in E‖ΔW x‖² when they are at their
best, which is

    w_k ← w_k − e C_jk / C_jj   for k > j

whatever became of the columns before. Over a whole sweep these costs add up.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from secateur.linalg.least_squares import damped_cholesky

#: from the index of a column in its block, and the block as it stands, what the column becomes
Settle = Callable[[int, Tensor], Tensor]


def inverse_factor(gram: Tensor, ridge: float, what: str = "column sweep") -> Tensor:
    """Upper triangular C with CᵀC = (H + λI)⁻¹, λ = ridge · mean of H's diagonal.

    C comes from the Cholesky factor of H in reversed order, so no matrix is factorized that
    rounding may have made indefinite. If H is not positive definite, λ is increased with a warning;
    H is never replaced.
    """
    reverse, _ = damped_cholesky(gram.flip(0, 1), ridge, what)
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor: Tensor = torch.linalg.solve_triangular(reverse.flip(0, 1), eye, upper=True)
    return factor


def sweep(
    weight: Tensor, factor: Tensor, width: int, begin: Callable[[int, Tensor], Settle]
) -> Tensor:
    """Update a weight column by column, in blocks of ``width`` columns; ``factor`` is C.

    ``begin`` gets the first column of each block, and the block with all earlier errors
    compensated, and returns a function that decides its columns.
    """
    current, found = weight.clone(), torch.empty_like(weight)
    rows = factor / factor.diagonal().unsqueeze(1)
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
