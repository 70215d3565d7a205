"""Predicted error against size, the common currency of methods and allocators."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Curve:
    """Predicted error of a unit's output at every size 0 … today's, as a share of its energy."""

    errors: tuple[float, ...]

    def at(self, size: int) -> float:
        """The error at one size."""
        return self.errors[size]

    @classmethod
    def of(cls, errors: Tensor) -> "Curve":
        """From absolute errors at sizes 0 … n; the error at size 0 is the whole energy."""
        whole = errors[0].clamp_min(1e-300)
        return cls(tuple((errors / whole).clamp(0, 1).tolist()))

    @classmethod
    def mean(cls, curves: Sequence["Curve"]) -> "Curve":
        """The mean of several of one length."""
        columns = zip(*(curve.errors for curve in curves), strict=True)
        return cls(tuple(sum(column) / len(curves) for column in columns))
