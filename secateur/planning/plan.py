"""The plan: which unit gets which size. Plain data, readable, editable, replayable."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field

from secateur import allocate, methods
from secateur.allocate.base import Allocator, Evidence
from secateur.allocate.plain import PlainWidth
from secateur.calibration.collect import Store
from secateur.data.tokens import Calibration, Tokens
from secateur.io.schema import Parts, Record, read_record
from secateur.layers.forms_secateur import FORMS
from secateur.layers.integers import INTEGERS, LIBRARY
from secateur.methods.base import Method
from secateur.models.model import Model, fingerprint, has_forms
from secateur.scoring.latency import measured
from secateur.scoring.plan_scoring import Stitched
from secateur.structure.budget import Goal, Tier, Written
from secateur.structure.costs import Prices, Target, counted
from secateur.structure.runtime_limits import Runtime
from secateur.structure.units import DEPTH, MATRICES, Matrix, Unit
from secateur.utils.errors import InputError, nearest, shown
from secateur.utils.options import built
from secateur.utils.registry import Registry
from secateur.version import __version__

MAX_PLAN_BYTES = 64 * 2**20
#: Nine digits: threads that add in another order change the last ones, and plans must not differ.
Figure = Annotated[float, AfterValidator(lambda value: float(f"{value:.9g}"))]


def _is_spec(form: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(form.get("form"), str):
        raise ValueError("a spec has the name of its form as 'form'")
    return form


class Base(Record):
    """The model a plan is for."""

    source: str
    model_type: str
    fingerprint: str


class CalibrationRecord(Record):
    """The text a plan rests on; ``fingerprint`` is that of the token windows.

    ``select`` says how the windows were chosen, ``windows`` which ones, unless at random.
    """

    source: str
    samples: int = Field(ge=1)
    length: int = Field(ge=2)
    seed: int = Field(ge=-(2**63), lt=2**63)
    tokens: int
    fingerprint: str
    select: str = "none"
    windows: Parts[int] = ()

    def choice(self) -> Calibration:
        """The choice of text that led to these tokens."""
        return Calibration(
            self.source, self.samples, self.length, self.seed, self.select, self.windows
        )


class Choice(Record):
    """The name of a method or an allocator, and all of its fields.

    ``package`` is what declares it, with its version, where that is another package than secateur.
    """

    name: str
    options: dict[str, int | float | str]
    package: str | None = Field(default=None, exclude_if=lambda package: package is None)

    @classmethod
    def of(cls, chosen: Method | Allocator, registry: Registry) -> "Choice":
        """That of an object."""
        package = registry.package(chosen.name)
        return cls(name=chosen.name, options=asdict(chosen), package=package)


class Budget(Record):
    """What was asked for and what the sizes add up to.

    Attributes:
        keep: share asked for.
        of: what is counted: parameters, bytes, operations or cache of all units, or the time of a
            forward pass.
        total: that count in the dense model.
        reached: count of the plan's sizes divided by ``total``.
        batch: sequences in the pass that latency is measured on.
        length: tokens in each.
    """

    keep: float = Field(ge=0, le=1)
    of: Target
    total: int
    reached: float
    batch: int = Field(ge=1)
    length: int = Field(ge=1)


class Row(Record):
    """One unit: its size before and after, what it costs then, and what that should do.

    Attributes:
        predicted_error: share of the unit's own output that is lost, before any later refit, or
            what else the method's ``curve`` says.
        predicted_loss: divergence of the model's output, in nats, measured with this unit
            alone narrowed; None where the allocator did not ask for it.
        form: of a matrix the spec of what it becomes; None where it stays dense.
        becomes: the same in words.
        dense_bytes: of a matrix what it takes dense.
    """

    unit: str
    kind: str
    before: int = Field(ge=1)
    after: int = Field(ge=0)
    parameters: int
    bytes: int
    flops_per_token: int
    cache_bytes_per_token: int
    predicted_error: Figure
    predicted_loss: Figure | None
    form: Annotated[dict[str, Any], AfterValidator(_is_spec)] | None = None
    becomes: str | None = None
    dense_bytes: int | None = None

    @property
    def linears(self) -> list[str]:
        """Of a matrix the linear layers whose weight it is: ``a.x+y`` are ``a.x`` and ``a.y``."""
        inside, _, names = self.unit.rpartition(".")
        return [f"{inside}.{name}" for name in names.split("+")]


class Plan(Record):
    """Sizes for all units of one model, and where they came from."""

    version: Literal[2] = 2
    secateur: str
    base: Base
    calibration: CalibrationRecord
    method: Choice
    allocator: Choice
    multiple_of: int = Field(ge=1)
    runtime: Runtime = "transformers"
    budget: Budget
    tier: Written
    units: Parts[Row]

    @property
    def sizes(self) -> dict[str, int]:
        """Unit name to size."""
        return {row.unit: row.after for row in self.units}

    @property
    def goal(self) -> Goal:
        """What was asked for, but for the tier: sizes that are given need no constraint."""
        budget = self.budget
        tier: Tier = "plain" if self.tier == "plain" else "per-layer"
        return Goal(budget.of, tier, self.multiple_of, budget.batch, budget.length, self.runtime)

    @property
    def densified(self) -> int:
        """How many matrices are stored in a form that is computed as if it were dense."""
        layers = [(FORMS.get(row.form.get("form", "")), row) for row in self.units if row.form]
        return sum(len(row.linears) for layer, row in layers if layer and layer.densified)

    @property
    def libraries(self) -> list[str]:
        """What has to be installed, beside transformers, where the result is loaded."""
        forms = {row.form["form"] for row in self.units if row.form is not None}
        return [LIBRARY] if INTEGERS in forms else []

    @property
    def predicted_loss(self) -> float | None:
        """Sum over units; the interactions between them come on top."""
        losses = [row.predicted_loss for row in self.units]
        return None if None in losses else sum(loss for loss in losses if loss is not None)

    def build_method(self) -> Method:
        """The method object that this plan was made with."""
        choice = self.method
        return built(
            methods.method_class(choice.name, choice.package),
            choice.options,
            f"plan: {choice.name}",
        )

    def build_allocator(self) -> Allocator:
        """The allocator object that this plan was made with."""
        choice = self.allocator
        return built(
            allocate.allocator_class(choice.name, choice.package),
            choice.options,
            f"plan: {choice.name}",
        )

    def to_json(self) -> str:
        """Indented JSON, one field a line."""
        return self.model_dump_json(indent=1) + "\n"


def usual_allocator(method: Method, goal: Goal) -> Allocator:
    """What spends a budget where none is named: what the tier demands, or the method's own."""
    # whole blocks and matrices leave no odd shapes
    shaped = goal.tier == "plain" and method.kinds not in (DEPTH, MATRICES)
    return PlainWidth() if shaped else method.allocator


def make_plan(
    model: Model,
    method: Method,
    evidence: Evidence,
    calibration: Calibration,
    tokens: Tokens,
    goal: Goal | None = None,
    allocator: Allocator | None = None,
    prices: Prices | None = None,
    store: Store | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> Plan:
    """Decide the size of every unit from the evidence; no weight is touched.

    ``allocator`` is by default what the goal's tier demands, or else the method's own; ``prices``
    are those of the goal. An allocator that searches needs the ``store`` with the statistics, to
    judge the models that its candidates would give; ``advance`` is told how many are judged.

    Raises:
        InputError: the budget is out of reach, or windows are still to be chosen.
    """
    if calibration.select != "none" and not calibration.windows:
        raise InputError(
            f"the calibration's windows are still to be chosen by {calibration.select!r}; give "
            "make_plan, and calibration_tokens, what select_calibration returns."
        )
    goal = goal or Goal(method.target)
    allocator = allocator or usual_allocator(method, goal)
    units = goal.units(method, model)
    prices = prices or prices_of(model, units, goal)
    if allocator.searches and store is not None:
        allocator.check(units, prices, method.keep)
        allowed = {unit.name: allocator.choices(unit) for unit in units}
        stitched = Stitched(model, method, units, allowed, store, tokens)

        def judge(sizes: Mapping[str, int]) -> float:
            found = stitched(sizes)
            advance(1)
            return found

        evidence = replace(evidence, judge=judge)
    if method.keep == 0:  # as little as there can be
        sizes = allocator.least(units, prices)
    else:
        sizes = allocator.allocate(units, evidence, prices, method.keep)
    return Plan(
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
        allocator=Choice.of(allocator, allocate.REGISTRY),
        multiple_of=goal.multiple_of,
        runtime=goal.runtime,
        budget=_budget(units, sizes, method.keep, prices, goal),
        tier=_tier(model, units, sizes),
        units=_rows(units, sizes, evidence, model.stored),
    )


def prices_of(model: Model, units: Sequence[Unit], goal: Goal) -> Prices:
    """The prices of a goal: counted, or for latency measured (once a machine, then cached)."""
    if goal.target == "latency":
        return measured(model, units, goal)
    return counted(units, goal.target, model.stored.itemsize)


def _budget(
    units: Sequence[Unit], sizes: Mapping[str, int], keep: float, prices: Prices, goal: Goal
) -> Budget:
    total, kept = prices.whole(units), prices.spent(units, sizes)
    return Budget(
        keep=keep,
        of=prices.target,
        total=total,
        reached=kept / total,
        batch=goal.batch,
        length=goal.length,
    )


def _rows(
    units: Sequence[Unit], sizes: Mapping[str, int], evidence: Evidence, stored: torch.dtype
) -> tuple[Row, ...]:
    gone = {unit.block for unit in units if unit.kind == "value_output" and not sizes[unit.name]}
    rows = []
    for unit in units:
        size, loss = sizes[unit.name], None
        if evidence.losses is not None:  # queries and keys lose nothing where no value is read
            read = unit.kind != "query_key" or unit.block not in gone
            loss = evidence.losses[unit.name].at(size) if read else 0.0
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


def read_plan(path: Path) -> Plan:
    """Read a plan file.

    Raises:
        InputError: the file is missing, too large, no JSON, or not a plan of this version.
    """
    advice = " A new one comes from `secateur plan`."
    plan = read_record(Plan, path, "plan", MAX_PLAN_BYTES, advice)
    if plan.calibration.select != "none" and not plan.calibration.windows:
        raise InputError(
            f"plan {str(path)!r}: calibration.select is {shown(plan.calibration.select)}, and "
            f"calibration.windows does not say which windows that chose; list them, or set select "
            f"to 'none' for windows drawn at random.{advice}"
        )
    return plan


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
    units = check_sizes(plan, model, method)
    prices = prices or prices_of(model, units, plan.goal)
    rows = _rows(units, plan.sizes, evidence, model.stored)
    return plan.model_copy(
        update={
            "units": rows,
            "budget": _budget(units, plan.sizes, plan.budget.keep, prices, plan.goal),
            "tier": _tier(model, units, plan.sizes),
        }
    )


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
    units = {unit.name: unit for unit in plan.goal.units(method, model)}
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
    for unit in units.values():
        values = f"layers.{unit.block}.value_output"
        if unit.kind == "query_key" and plan.sizes[unit.name] and not plan.sizes[values]:
            raise InputError(
                f"plan, {unit.name}: size {plan.sizes[unit.name]} is of no use where {values} is "
                f"gone; the nearest is 0."
            )
    return list(units.values())


def _for(plan: Plan) -> str:
    return "" if plan.runtime == "transformers" else f" for {plan.runtime}"
