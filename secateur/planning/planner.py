"""From evidence to a plan: sizes for all units, within the budget."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from secateur import allocate, methods
from secateur.allocate.base import Allocator, Evidence
from secateur.calibration.collect import Store
from secateur.data.tokens import Calibration, Tokens
from secateur.methods.base import Method
from secateur.methods.fitted import FitData, FittedMethod, fit_within
from secateur.methods.step import Step
from secateur.models.model import Model, fingerprint, has_forms
from secateur.planning.checks import check_sizes
from secateur.planning.plan import Base, BudgetRecord, CalibrationRecord, Choice, Plan, Row
from secateur.scoring.plan_scoring import PlanScorer
from secateur.scoring.prices import prices_of
from secateur.structure.budget import Budget, Written
from secateur.structure.costs import Prices
from secateur.structure.selection import Selection
from secateur.structure.units import Matrix, Unit, unread
from secateur.utils.errors import InputError
from secateur.version import __version__


def make_plan(
    model: Model,
    method: Method,
    evidence: Evidence,
    calibration: Calibration,
    tokens: Tokens,
    *,
    budget: Budget | None = None,
    allocator: Allocator | None = None,
    prices: Prices | None = None,
    store: Store | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> Plan:
    """Decide the size of every unit from the evidence; no weight is touched.

    ``budget`` and ``allocator`` are by default the method's usual ones; ``prices`` are those of the
    budget. An allocator that searches needs the ``store`` with the statistics, to judge the models
    that its candidates would give; ``advance`` is told how many are judged.

    Raises:
        InputError: the budget is out of reach, or windows are still to be chosen.
    """
    if calibration.select != "none" and not calibration.windows:
        raise InputError(
            f"the calibration's windows are still to be chosen by {calibration.select!r}; give "
            "make_plan, and calibration_tokens, what select_calibration returns."
        )
    step = Step.of(method, budget, allocator).filled
    units = step.units(model)
    prices = prices or prices_of(model, units, step.budget)
    if step.allocator.searches and store is not None:
        step.allocator.check(units, prices, step.budget.share)
        judge = _judge(_scorer(model, step, units, store, tokens), advance)
        evidence = replace(evidence, judge=judge)
    data = FitData(tokens, store)
    sizes, selection = _decided(model, step, units, evidence, prices=prices, data=data)
    plan = Plan(
        secateur=__version__,
        base=Base(
            source=model.source,
            model_type=model.config.model_type,
            fingerprint=fingerprint(model),
        ),
        calibration=CalibrationRecord(
            **calibration.as_dict(), tokens=tokens.count, fingerprint=tokens.fingerprint
        ),
        method=Choice.of(method, methods.REGISTRY),
        allocator=_allocator(step),
        asked=step.budget.as_dict(),
        budget=_spent(units, sizes, prices, step.budget),
        tier=_tier(model, units, sizes),
        units=_rows(units, sizes, evidence, model.stored),
    )
    return plan.with_selection(selection)


def _judge(
    scorer: PlanScorer, advance: Callable[[int], None]
) -> Callable[[Mapping[str, int]], float]:
    """What measures candidates, and tells how many are done."""

    def judge(sizes: Mapping[str, int]) -> float:
        found = scorer(sizes)
        advance(1)
        return found

    return judge


def _decided(
    model: Model,
    step: Step,
    units: Sequence[Unit],
    evidence: Evidence,
    *,
    prices: Prices,
    data: FitData,
) -> tuple[dict[str, int], Selection | None]:
    """All sizes, by the allocator or by a method that is fitted as a whole."""
    method, share = step.method, step.budget.share
    if not isinstance(method, FittedMethod):
        return step.allocator.spend(units, evidence, prices, share), None
    step.allocator.check(units, prices, share)  # allocators check a budget themselves
    assert not isinstance(share, str)
    return fit_within(method, model, units, prices, prices.budget(units, share), data=data)


def _allocator(step: Step) -> Choice | None:
    if isinstance(step.method, FittedMethod):
        return None
    return Choice.of(step.allocator, allocate.REGISTRY)


def _scorer(
    model: Model, step: Step, units: Sequence[Unit], store: Store, tokens: Tokens
) -> PlanScorer:
    """The model with all units at any sizes that the allocator may choose."""
    allowed = {unit.name: step.allocator.choices(unit) for unit in units}
    return PlanScorer(model, step.method, units, allowed=allowed, store=store, tokens=tokens)


def _spent(
    units: Sequence[Unit], sizes: Mapping[str, int], prices: Prices, budget: Budget
) -> BudgetRecord:
    total, kept = prices.whole(units), prices.spent(units, sizes)
    return BudgetRecord(
        keep=0.0 if isinstance(budget.share, str) else budget.share,
        of=prices.target,
        total=total,
        reached=kept / total,
        batch=budget.batch,
        length=budget.length,
    )


def _rows(
    units: Sequence[Unit], sizes: Mapping[str, int], evidence: Evidence, stored: torch.dtype
) -> tuple[Row, ...]:
    idle, rows = unread(units, sizes), []
    for unit in units:
        size, loss = sizes[unit.name], None
        if evidence.losses is not None:  # what nothing makes use of loses nothing
            loss = 0.0 if unit.name in idle else evidence.losses[unit.name].at(size)
        row = Row(
            unit=unit.name,
            kind=unit.kind,
            before=unit.size,
            after=size,
            predicted_error=0.0 if size == unit.size else evidence.curves[unit.name].at(size),
            predicted_loss=loss,
            **_form(unit, size, stored.itemsize),
            **asdict(unit.cost(size, stored.itemsize)),
        )
        rows.append(row)
    return tuple(rows)


def _form(unit: Unit, size: int, itemsize: int) -> dict[str, Any]:
    if not isinstance(unit, Matrix):
        return {}
    form = unit.at(size)
    return {
        "form": None if form is None else dict(form.spec),
        "becomes": unit.described(size),
        "dense_bytes": unit.cost(unit.size, itemsize).bytes,
    }


def _tier(model: Model, units: Sequence[Unit], sizes: Mapping[str, int]) -> Written:
    """What sizes and forms need, and what a checkpoint that is compressed already has needed."""
    tier = tier_of(units, sizes)
    if has_forms(model.config):
        return "factored"
    return "per-layer" if model.narrowed and tier == "plain" else tier


def tier_of(units: Sequence[Unit], sizes: Mapping[str, int]) -> Written:
    """ "plain" where stock classes can express the sizes: one MLP width, attention untouched.

    Whole blocks may be missing, as long as no constant takes their place. "factored" where a matrix
    has a form that only a layer of our own can read.
    """
    matrices = [(u, u.at(sizes[u.name])) for u in units if isinstance(u, Matrix)]
    if any(form is not None and not form.stock for _, form in matrices):
        return "factored"
    if matrices:
        published = all(unit.published for unit, form in matrices if form is not None)
        return "plain" if published else "per-layer"
    stock = not any(unit.new_bias and sizes[unit.name] < unit.size for unit in units)
    gone = {unit.block for unit in units if unit.kind == "block" and not sizes[unit.name]}
    left = [unit for unit in units if unit.block not in gone]
    widths = {sizes[unit.name] for unit in left if unit.kind == "mlp"}
    attention = all(sizes[unit.name] == unit.size for unit in left if unit.kind != "mlp")
    plain = stock and attention and len(widths) <= 1 and 0 not in widths
    return "plain" if plain else "per-layer"


def revise(
    plan: Plan,
    model: Model,
    method: Method,
    evidence: Evidence,
    prices: Prices | None = None,
) -> Plan:
    """Recompute what follows from the sizes of a plan that may have been edited.

    Raises:
        InputError: the plan is for another model, or a size is not allowed.
    """
    units, budget = check_sizes(plan, model, method), plan.asked_budget
    prices = prices or prices_of(model, units, budget)
    rows = _rows(units, plan.sizes, evidence, model.stored)
    return plan.model_copy(
        update={
            "units": rows,
            "budget": _spent(units, plan.sizes, prices, budget),
            "tier": _tier(model, units, plan.sizes),
        }
    )
