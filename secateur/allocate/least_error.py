"""The knapsack over errors that methods predict, without measurements."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from secateur.allocate.base import Evidence
from secateur.allocate.knapsack import Knapsack
from secateur.structure.error_curve import Curve


@dataclass(frozen=True)
class LeastError(Knapsack):
    """Find the sizes with the smallest sum of predicted errors: min Σ_u curve_u(k_u).

    For whole blocks of equal cost, this removes those with the smallest errors until the budget is
    met. Don't use it for units whose errors are not comparable, such as widths: each error is
    relative to the output of its own unit, however important that is to the model.

    Source: arXiv 2403.03853, section 3.2, for blocks; multiple-choice knapsack for anything else.
    """

    name: ClassVar[str] = "least-error"
    summary: ClassVar[str] = "smallest sum of predicted errors; measures nothing"
    source: ClassVar[str] = "arXiv 2403.03853; dynamic programming"
    measured: ClassVar[bool] = False

    def losses(self, evidence: Evidence) -> Mapping[str, Curve]:
        """The curves."""
        return evidence.curves
