"""Backward elimination: removes features from a least-squares fit one by one.

Row convention, y = x W; C is a Gram of n features, as in :mod:`secateur.linalg.least_squares`.
"""

import torch
from torch import Tensor

from secateur.linalg.least_squares import damped_cholesky
from secateur.linalg.symmetric import add_product, kept

PANEL = 128  # removals between two updates of all rows and columns
GONE = 1 / 12  # of the rows; from there on they are dropped
TINY = 1e-200  # pivots are never smaller


def backward_elimination(
    gram: Tensor, cross: Tensor, ridge: float, what: str = "elimination", width: int = 1
) -> tuple[Tensor, Tensor]:
    """The order in which a least-squares fit can lose its features, best first, and E(k) for k = 0
    … n.

    With Ŵ the fit from the features that are left and H = C + λI on them, leaving out feature j and
    refitting the others costs exactly

        ‖Ŵ_j‖² / [H⁻¹]_jj,   and then   [H⁻¹ Ŵ] ← [H⁻¹ Ŵ] − H⁻¹_:j [H⁻¹ Ŵ]_j: / [H⁻¹]_jj

    so each step removes the cheapest and the costs add up to the error of the joint fit (optimal
    brain surgeon; ZipLM, arXiv 2302.04089, section 3.1). E(k) is above the error of all features.

    With ``width`` above 1 blocks of as many neighbours leave as a whole, order and errors are of
    blocks, and a block M costs tr Ŵ_Mᵀ [H⁻¹]_MM⁻¹ Ŵ_M.
    """
    inverse, fit = _fitted(gram, cross, ridge, what)
    removed, costs = _blocks(inverse, fit, width) if width > 1 else _singles(inverse, fit, 0)
    errors = torch.cat((costs.new_zeros(1), costs.cumsum(0)))
    return removed.flip(0), errors.flip(0)


def survivors(
    gram: Tensor, cross: Tensor, ridge: float, size: int, what: str = "elimination"
) -> Tensor:
    """The first ``size`` features of :func:`backward_elimination`, in ascending order.

    It takes the same steps, and stops early.
    """
    removed, _ = _singles(*_fitted(gram, cross, ridge, what), size)
    stays = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    stays[removed] = False
    return stays.nonzero().flatten()


def _fitted(gram: Tensor, cross: Tensor, ridge: float, what: str) -> tuple[Tensor, Tensor]:
    """H⁻¹ and Ŵ of all features."""
    factor, _ = damped_cholesky(gram, ridge, what)
    return torch.cholesky_inverse(factor), torch.cholesky_solve(cross, factor)


def _singles(inverse: Tensor, fit: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """The removed features, first removed first, until ``least`` remain, and the cost of each.

    Of Ŵ only the products M = ŴŴᵀ of its rows are needed. With p = H⁻¹_:j / √[H⁻¹]_jj and
    m = M_:j / √[H⁻¹]_jj − p M_jj / 2 [H⁻¹]_jj, a removal is

        H⁻¹ ← H⁻¹ − p pᵀ,   M ← M − p mᵀ − m pᵀ

    For a panel of removals p and m are kept beside H⁻¹ and M, whose diagonals alone are brought up
    to date; then all of them are taken off as one product, where processors are fast. Both matrices
    are kept on and above the diagonal.
    """
    shared = add_product(torch.zeros_like(inverse), fit.t(), fit.t())
    alive, gone = list(range(len(inverse))), set[int]()  # the latter as places in the former
    removed: list[int] = []
    costs: list[float] = []
    diagonals = torch.stack((inverse.diagonal(), shared.diagonal()))
    while len(alive) - len(gone) > least:
        if len(gone) >= max(1, GONE * len(alive)):
            there = [i for i in range(len(alive)) if i not in gone]
            stays = torch.tensor(there, device=inverse.device)
            inverse, shared = kept(inverse, stays), kept(shared, stays)
            diagonals, alive, gone = diagonals[:, stays], [alive[i] for i in there], set()
        panel = min(PANEL, len(alive) - len(gone))
        p, m = inverse.new_empty(2, panel, len(alive)).unbind()
        for step in range(panel):
            j = int((diagonals[1] / diagonals[0]).argmin())
            pivot, energy = diagonals[:, j].tolist()
            scale = pivot**-0.5 if pivot > TINY else 0.0  # nothing is left but rounding
            cost = energy * scale**2
            removed.append(alive[j])
            costs.append(max(0.0, cost))
            gone.add(j)
            if len(alive) - len(gone) == least:
                break
            before, behind = p[:step], m[:step]
            own, row = (torch.cat((x[:j, j], x[j, j:])) for x in (inverse, shared))
            own.addmv_(before.t(), before[:, j], alpha=-1).mul_(scale)
            row.addmv_(before.t(), behind[:, j], alpha=-1)
            row.addmv_(behind.t(), before[:, j], alpha=-1).mul_(scale)
            p[step], m[step] = own, row.sub_(own, alpha=cost / 2)
            diagonals[0].addcmul_(own, own, value=-1).clamp_min_(TINY)
            diagonals[1].addcmul_(own, row, value=-2)
            diagonals[1, j] = torch.inf
        else:
            add_product(inverse, p, p, -1)
            add_product(shared, torch.cat((p, m)), torch.cat((m, p)), -1)
    order = torch.tensor(removed, dtype=torch.int64, device=inverse.device)
    return order, inverse.new_tensor(costs)


def _blocks(inverse: Tensor, fit: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The same for blocks of neighbouring features; removed features are dropped immediately."""
    state = torch.cat((inverse, fit), 1)
    alive = torch.arange(len(state) // width, device=state.device)
    removed, costs = torch.empty_like(alive), state.new_zeros(len(alive))
    for step in range(len(removed)):
        count, size = len(alive), len(state)
        inverse, rows = state[:, :size], state[:, size:].unflatten(0, (count, width))
        blocks = inverse.reshape(count, width, count, width)
        pivots = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        cost = (rows * torch.linalg.solve(pivots, rows)).sum((1, 2))
        worst = cost.argmin()
        costs[step] = cost[worst]
        removed[step] = alive[worst]
        left = torch.arange(count, device=state.device) != worst
        stays = left.repeat_interleave(width)
        own, rest = state[~stays], state[stays]
        rest = rest - rest[:, :size][:, ~stays] @ torch.linalg.solve(pivots[worst], own)
        columns = torch.cat((stays, stays.new_ones(state.shape[1] - size)))
        state, alive = rest[:, columns], alive[left]
    return removed, costs
