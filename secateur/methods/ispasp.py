"""i-SpaSP: pruning of channels and heads by sparse recovery of the output."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from secateur.allocate.base import Allocator
from secateur.allocate.uniform import Uniform
from secateur.calibration.needs import BlockStatistics
from secateur.linalg.least_squares import damped
from secateur.methods.base import Solution
from secateur.methods.refitted import RefittedMethod, coordinates, narrowing, problem, refitted
from secateur.models.block import Block
from secateur.structure.error_curve import Curve
from secateur.structure.narrowing import Narrowing
from secateur.structure.units import Unit
from secateur.utils.errors import InputError
from secateur.utils.options import option

GRID = 16  #: sizes between which the curve of a large unit is linear


@dataclass(frozen=True)
class ISpaSP(RefittedMethod):
    """Choose by CoSaMP the k channels or heads j that best reproduce the output y = Σ_j x_j W_j.

    All that it needs is the Gram of what they add, M_ij = E⟨x_i W_i, x_j W_j⟩. Beginning with S
    empty, for a fixed size k:

        importance   |Σ_{i ∉ S} M_ji|      what x_j W_j shares with the residual y − Σ_S x_i W_i
        merge        T = S ∪ the 2k most important
        cut          S = the k of T with the largest M_jj

    The S of least residual over all iterations stays. As published nothing is refitted; with
    ``refit`` residual and consumer are those of the least squares fit. Don't use it without
    ``refit`` below about 0.8.

    Source: Wolfe and Kyrillidis, "i-SpaSP: Structured Neural Pruning via Sparse Signal Recovery",
    arXiv 2112.04905, algorithm 1; CoSaMP, arXiv 0803.2392.
    """

    iterations: int = option(20, "iterations of merging and cutting", 1)
    refit: int = option(0, "1 refits the remaining weights, 0 does not", 0, 1)

    name: ClassVar[str] = "ispasp"
    summary: ClassVar[str] = "prunes channels and heads by sparse recovery of the output (CoSaMP)"
    source: ClassVar[str] = "arXiv 2112.04905"

    @property
    def allocator(self) -> Allocator:
        """One ratio for all."""
        return Uniform()

    def solve(self, unit: Unit, block: Block, statistics: BlockStatistics) -> Solution:
        """A set for each size that is asked for; the curve is linear between some of them."""
        gram, weight, width = problem(unit, block, statistics)
        hessian = damped(gram, self.ridge) if self.refit else gram
        parts = (gram * (weight @ weight.t())).unflatten(0, (-1, width)).unflatten(2, (-1, width))
        shared = parts.sum((1, 3))  # M

        def rows(keep: Tensor) -> Tensor | None:
            return refitted(hessian, weight, keep, width, unit.name) if self.refit else None

        def residual(keep: Tensor) -> tuple[Tensor, float]:
            """What everything shares with the residual, and its energy."""
            if (fitted := rows(keep)) is None:
                gone = torch.ones_like(shared[0])
                gone[keep] = 0
                lost = shared @ gone
                energy = float(gone @ lost)
            else:
                change = weight.clone()
                change[coordinates(keep, width)] -= fitted
                moved = gram @ change
                lost = (moved * weight).sum(1).view(-1, width).sum(1)
                energy = float((moved * change).sum())
            if not math.isfinite(energy):  # below no other: no set would stay
                raise InputError(
                    f"{unit.name}: the residual's energy is NaN or infinite; try --dtype float32, "
                    "or check the model with `secateur eval`."
                )
            return lost, energy

        @cache
        def recovered(size: int) -> tuple[Tensor, float]:
            return recover(shared.diagonal(), residual, size, self.iterations)

        def at(size: int) -> Narrowing:
            keep, _ = recovered(size)
            return narrowing(unit, block, keep, rows(keep))

        sizes = sorted({*range(0, unit.size, -(-unit.size // GRID)), unit.size})
        errors = np.interp(range(unit.size + 1), sizes, [recovered(k)[1] for k in sizes])
        errors = np.maximum.accumulate(errors.clip(0, errors[0])[::-1])[::-1]
        return Solution(Curve.of(torch.from_numpy(errors.copy())), at)


def recover(
    energies: Tensor, residual: Callable[[Tensor], tuple[Tensor, float]], size: int, iterations: int
) -> tuple[Tensor, float]:
    """The best support of a size that CoSaMP's iterations meet, ascending, and its residual."""
    every = torch.arange(len(energies), device=energies.device)
    if size == len(energies):
        return every, 0.0
    keep = every[:0]
    shared, error = residual(keep)
    if size == 0:
        return keep, error
    best, least = keep, math.inf
    for _ in range(iterations):
        important = torch.sort(shared.abs(), descending=True, stable=True).indices[: 2 * size]
        merged = torch.cat((keep, important)).unique()
        strongest = torch.sort(energies[merged], descending=True, stable=True).indices[:size]
        before, keep = keep, torch.sort(merged[strongest]).values
        if torch.equal(before, keep):
            break
        shared, error = residual(keep)
        if error < least:
            best, least = keep, error
    return best, least
