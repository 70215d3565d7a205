"""WeLore's allocation: one threshold on normalized singular values for the whole model."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.allocate.base import Evidence, ShareAllocator
from secateur.calibration.needs import BlockStatistics, Need
from secateur.linalg.least_squares import energies
from secateur.models.block import Block
from secateur.structure.costs import Prices
from secateur.structure.units import Matrix, Unit

HALVINGS = 60
Spectrum = tuple[
    float, tuple[float, ...]
]  #: entries of a matrix, and its normalised singular values


@dataclass(frozen=True)
class WeLore(ShareAllocator):
    """Keep of each unit the share of singular values above a global threshold, for any method.

    With σ the singular values of a matrix,

        σ̃ = (σ − min σ) / (max σ − min σ),   kept = #(σ̃ ≥ k) / #σ

    and a unit's share is that of its matrices, weighed by their entries. The one k for all matrices
    is found by bisection, as the price falls with k: the target is the budget, not a mean rank.
    The share of a matrix is what factors of that rank take of it, at most all. Weights only, and
    one outlying singular value makes all others of its matrix look small, as published. Don't use
    it where there is text to calibrate on.

    Source: Jaiswal et al., "From GaLore to WeLore", arXiv 2407.11239.
    """

    name: ClassVar[str] = "welore"
    summary: ClassVar[str] = "share of singular values above one threshold for the whole model"
    source: ClassVar[str] = "arXiv 2407.11239"
    needs: ClassVar[frozenset[Need]] = frozenset()

    @property
    def reading(self) -> str:
        """Normalised singular values."""
        return "normalised singular values"

    def read(self, block: Block, statistics: BlockStatistics) -> tuple[float, ...]:
        """Of every matrix its entries, how many singular values it has, and these, ascending."""
        found: list[float] = []
        for matrix in block.matrices:
            values = normalised(energies(matrix).sqrt()) if matrix.numel() else matrix.flatten()
            found += [matrix.numel(), len(values), *values.tolist()]
        return tuple(found)

    def shares(
        self, units: Sequence[Unit], evidence: Evidence, prices: Prices, keep: float
    ) -> dict[str, float]:
        """The shares at the threshold that spends the budget."""
        spectra = [list(_matrices(reading)) for reading in evidence.readings]
        whole = {unit.name: prices.of(unit, unit.size) for unit in units}

        def at(threshold: float) -> dict[str, float]:
            return {u.name: _share(u, spectra[u.block], threshold) for u in units}

        low, high = 0.0, 2.0  # all stay at 0, none at 2
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            spent = sum(whole[name] * share for name, share in at(middle).items())
            low, high = (middle, high) if spent > keep * sum(whole.values()) else (low, middle)
        return at(high if keep < 1 else 0.0)


def normalised(values: Tensor) -> Tensor:
    """From 0 to 1; all 1 where none is larger than another, as nothing is there to spare."""
    low, high = values.min(), values.max()
    spread = float(high - low)
    if spread <= 1e-9 * float(high):
        return torch.ones_like(values)
    return (values - low) / spread


def kept(matrices: Sequence[Spectrum], threshold: float) -> float:
    """The share of singular values at or above a threshold, by the entries of their matrices."""
    entries = sum(size for size, _ in matrices)
    above = (size * (1 - bisect_left(values, threshold) / len(values)) for size, values in matrices)
    return sum(above) / entries


def _matrices(reading: Sequence[float]) -> list[Spectrum]:
    """Entries and normalised singular values of q, k, v, o and the MLP's matrices."""
    found, at = [], 0
    while at < len(reading):
        count = int(reading[at + 1])
        found.append((reading[at], tuple(reading[at + 2 : at + 2 + count])))
        at += 2 + count
    return found


def _share(unit: Unit, matrices: Sequence[Spectrum], threshold: float) -> float:
    """What a unit keeps: of its size, or of the bytes of its matrix."""
    if not isinstance(unit, Matrix):
        own = matrices if unit.matrices is None else matrices[slice(*unit.matrices)]
        return kept(own, threshold)
    rank = kept(_of_matrix(unit, matrices), threshold) * min(unit.outputs, unit.inputs)
    return min(1.0, rank * (unit.outputs + unit.inputs) / (unit.outputs * unit.inputs))


def _of_matrix(unit: Matrix, matrices: Sequence[Spectrum]) -> Sequence[Spectrum]:
    """The spectrum of a matrix, or those of its equal parts where gate and up are stored as one."""
    at = matrices[unit.order :]
    found: list[Spectrum] = []
    while sum(entries for entries, _ in found) < unit.outputs * unit.inputs:
        found.append(at[len(found)])
    return found
