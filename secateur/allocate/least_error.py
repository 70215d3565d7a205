"""The knapsack over what methods predict, where nothing is measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from secateur.allocate.base import Evidence
from secateur.allocate.knapsack import Knapsack
from secateur.structure.error_curve import Curve


@dataclass(frozen=True)
class LeastError(Knapsack):
    """The sizes of least summed error within the budget: min Σ_u curve_u(k_u).

    Over whole blocks of one price, that drops those of least error until the budget is met. Don't
    use it over units whose errors mean different things, as those of widths do: each is a share of
    its own unit's output, whatever that is worth to the model.

    Source: arXiv 2403.03853, section 3.2, for blocks; multiple-choice knapsack for anything else.
    """

    name: ClassVar[str] = "least-error"
    summary: ClassVar[str] = "least sum of predicted errors, which costs no measuring"
    source: ClassVar[str] = "arXiv 2403.03853; dynamic programming"
    measured: ClassVar[bool] = False

    def losses(self, evidence: Evidence) -> Mapping[str, Curve]:
        """The curves."""
        return evidence.curves
