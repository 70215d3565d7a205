"""What every size of every unit costs in the currency of a budget."""

from collections.abc import Sequence

from secateur.models.model import Model
from secateur.scoring.latency import measured
from secateur.structure.budget import Budget
from secateur.structure.costs import Prices, counted
from secateur.structure.units import Unit


def prices_of(model: Model, units: Sequence[Unit], budget: Budget) -> Prices:
    """Prices in the budget's currency: counted, or measured (once a machine, then cached)."""
    if budget.target == "latency":
        return measured(model, units, budget)
    return counted(units, budget.counts, model.stored.itemsize)
