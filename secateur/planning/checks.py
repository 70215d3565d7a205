"""A plan held against a model: its weights, its units and the sizes that these may take."""

from collections import Counter

from secateur.methods.base import Method
from secateur.methods.step import Step
from secateur.models.model import Model, fingerprint
from secateur.planning.plan import Plan
from secateur.structure.units import Unit, unread
from secateur.utils.errors import InputError, nearest, shown


def check_sizes(plan: Plan, model: Model, method: Method) -> list[Unit]:
    """Hold a plan against a model and give the model's units.

    Raises:
        InputError: another model, unknown or missing units, or a size that a unit may not take.
    """
    found = fingerprint(model)
    if found != plan.base.fingerprint:
        raise InputError(
            f"the plan is for another model: its base.fingerprint is {plan.base.fingerprint}, that "
            f"of {model.source!r} is {found}. Make a new one with `secateur plan`."
        )
    return match_units(plan, model, method)


def match_units(plan: Plan, model: Model, method: Method) -> list[Unit]:
    """The part of :func:`check_sizes` that needs no weights.

    Raises:
        InputError: unknown or missing units, or a size that a unit may not take; queries and keys
            whose values are gone must be gone too.
    """
    step = Step(method, plan.asked_budget, method.allocator)
    units = {unit.name: unit for unit in step.units(model)}
    named = [row.unit for row in plan.units]
    unknown, missing = sorted(set(named) - set(units)), sorted(set(units) - set(named))
    if unknown:
        hint = nearest(unknown[0], missing) if missing else "Remove that row."
        raise InputError(f"plan: the model has no unit {shown(unknown[0])} for this method. {hint}")
    if missing:
        raise InputError(
            f"plan: there is no row for unit {missing[0]!r}. Every unit has one, even where "
            f"it keeps its size; `secateur plan` writes them all."
        )
    if twice := sorted(name for name, count in Counter(named).items() if count > 1):
        raise InputError(f"plan: there are several rows for unit {twice[0]!r}. Keep one.")
    for row in plan.units:
        allowed = units[row.unit].sizes()
        if row.after not in allowed:
            close = min(allowed, key=lambda size: abs(size - row.after))
            raise InputError(
                f"plan, {row.unit}: size {row.after} is not allowed{_for(plan)}; the nearest is "
                f"{close}."
            )
    blocks = [unit.name for unit in units.values() if unit.kind == "block"]
    if blocks and not any(plan.sizes[name] for name in blocks):
        raise InputError(f"plan: no block is left; give {blocks[0]} or another one size 1.")
    every = list(units.values())
    idle = unread(every, plan.sizes)
    for unit in every:
        if unit.name in idle and plan.sizes[unit.name]:
            wanted = unit.block, unit.part, unit.serves
            gone = next(u.name for u in every if (u.block, u.part, u.kind) == wanted)
            raise InputError(
                f"plan, {unit.name}: size {plan.sizes[unit.name]} is of no use where {gone} is "
                f"gone; the nearest is 0."
            )
    return every


def _for(plan: Plan) -> str:
    runtime = plan.asked_budget.runtime
    return "" if runtime == "transformers" else f" for {runtime}"
