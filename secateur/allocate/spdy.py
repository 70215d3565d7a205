"""SPDY: a search finds weights of the units; candidates are evaluated on the whole model."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from secateur.allocate.base import Evidence
from secateur.allocate.knapsack import Knapsack
from secateur.structure.costs import Prices
from secateur.structure.error_curve import Curve
from secateur.structure.units import Unit
from secateur.utils.options import option

DRAWN = 0.25  #: share of the steps that draw all weights anew
RESAMPLED = 0.1  #: share of the units whose weight the first of the other steps draw anew


@dataclass(frozen=True)
class SPDY(Knapsack):
    """Minimize a weighted sum of the units' errors, with weights found by search.

    With p_u(k) the relative error of unit u's output at size k, so that p² is its error curve, and
    c_u the weight of the unit,

        sizes(c) = argmin Σ_u c_u · p_u(k_u)²   subject to   Σ_u price_u(k_u) ≤ budget
        c        = argmin loss of the model with all units at sizes(c)

    The sizes come from the knapsack's dynamic programming. c starts at one; a quarter of the steps
    draws it at random, the others draw some weights of the best c so far anew, a tenth of them at
    first and one at last. A draw is the square of a uniform number, where the published one is
    uniform and small weights are rare. The loss is the divergence from the dense model on
    calibration windows, before any refit behind narrowed blocks. Don't use it where the narrowed
    weights of all units at all ``levels`` don't fit into memory.

    Source: Frantar and Alistarh, SPDY, arXiv 2202.06749, section 3; with these errors ZipLM,
    arXiv 2302.04089, section 3.2.
    """

    steps: int = option(100, "candidates to evaluate; each takes a pass over some windows", 1)
    levels: int = option(20, "number of evenly spaced sizes tried for each unit", 1)
    search_seed: int = option(0, "seed of the search")

    name: ClassVar[str] = "spdy"
    summary: ClassVar[str] = "smallest weighted sum of predicted errors; a search finds the weights"
    source: ClassVar[str] = "arXiv 2202.06749, 2302.04089"
    measured: ClassVar[bool] = False
    searches: ClassVar[bool] = True

    def judgements(self, units: Sequence[Unit], prices: Prices, keep: float) -> int:
        """One a step, but for those that come to sizes judged before."""
        return self.steps

    def choices(self, unit: Unit) -> list[int]:
        """Some of all sizes, the smallest and today's among them."""
        sizes = unit.sizes()
        last, levels = len(sizes) - 1, min(self.levels, len(sizes) - 1)
        return [sizes[round(i * last / levels)] for i in range(levels + 1)] if last else sizes

    def allocate(
        self, units: Sequence[Unit], evidence: Evidence, prices: Prices, keep: float
    ) -> dict[str, int]:
        """The sizes of the best weights that the search meets."""
        judge = self.judge(evidence)
        self.check(units, prices, keep)
        rng, known = random.Random(self.search_seed), dict[tuple[int, ...], float]()
        names = [unit.name for unit in units if not unit.fixed]
        best, weights = {unit.name: unit.size for unit in units}, dict.fromkeys(names, 1.0)
        least, drawn = float("inf"), round(DRAWN * self.steps)
        for step in range(self.steps):
            late = (step - drawn) / max(1, self.steps - drawn)  # from 0 to below 1
            some = max(1, round((1 - late) * RESAMPLED * len(names)))
            anew = [] if step == 0 else names if step < drawn else rng.sample(names, some)
            tried = weights | {name: rng.random() ** 2 for name in anew}
            sizes = self.weighted(tried, units, evidence, prices, keep)
            key = tuple(sizes[unit.name] for unit in units)
            if key not in known:
                known[key] = judge(sizes)
            if known[key] < least:
                least, best, weights = known[key], sizes, tried
        return best

    def weighted(
        self,
        weights: Mapping[str, float],
        units: Sequence[Unit],
        evidence: Evidence,
        prices: Prices,
        keep: float,
    ) -> dict[str, int]:
        """The sizes of least weighted error; weights default to one."""
        curves = {
            name: Curve(tuple(weights.get(name, 1.0) * error for error in curve.errors))
            for name, curve in evidence.curves.items()
        }
        return super().allocate(units, replace(evidence, losses=curves), prices, keep)
