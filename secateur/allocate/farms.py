"""FARMS: AlphaPruning on square windows, independent of the aspect ratios of matrices."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.allocate.alpha import AlphaPruning
from secateur.linalg.least_squares import energies
from secateur.utils.options import option


@dataclass(frozen=True)
class FARMS(AlphaPruning):
    """AlphaPruning with spectra of square windows, so that aspect ratios have no influence.

    Even the spectrum of noise depends on the aspect ratio of a matrix. Therefore the eigenvalues of
    square windows are pooled, and the exponent is computed from these. A window is as wide as the
    matrix's shorter side, at most ``window``; windows cover the matrix, overlapping only as far as
    that takes. (The paper has 10 to 15 offsets a side, which repeat the same entries at ten times
    the cost.) Don't use it in the cases that :class:`AlphaPruning` does not suit.

    Source: Hu et al., "Eigenspectrum Analysis of Neural Networks without Aspect Ratio Bias", arXiv
    2506.06280 (ICML 2025).

    Attributes:
        window: side of a window; the paper's 2000 is half the width of the models it is for.
    """

    window: int = option(2000, "maximum side of a window", 2)

    name: ClassVar[str] = "farms"
    summary: ClassVar[str] = "one share per block, by the spectra of square windows of its weights"
    source: ClassVar[str] = "arXiv 2506.06280"

    @property
    def reading(self) -> str:
        """The mean exponent, and the windows."""
        return f"alpha of windows, {self.window}"

    def spectrum(self, weight: Tensor) -> Tensor:
        """Eigenvalues of all windows together."""
        return torch.cat([energies(window) for window in windows(weight, self.window)])


def windows(weight: Tensor, most: int) -> Iterator[Tensor]:
    """Square windows, of at most ``most`` rows, that cover a matrix."""
    side = min(most, *weight.shape)
    rows, columns = (_offsets(length, side) for length in weight.shape)
    for row in rows:
        for column in columns:
            yield weight[row : row + side, column : column + side]


def _offsets(length: int, side: int) -> list[int]:
    count = math.ceil(length / side)
    return [round(i * (length - side) / max(1, count - 1)) for i in range(count)]
