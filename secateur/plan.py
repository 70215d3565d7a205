"""The plan: which unit gets which size. Plain data, readable, editable, replayable."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

import pydantic
import torch
from pydantic import BaseModel, ConfigDict, Field

from secateur.allocate.base import Evidence
from secateur.calibration import Store
from secateur.curve import Curve
from secateur.errors import InputError, nearest
from secateur.methods import method_class
from secateur.methods.base import Method
from secateur.model import Model
from secateur.statistics import Needs
from secateur.text import Calibration, Tokens
from secateur.units import Unit
from secateur.version import __version__

MAX_PLAN_BYTES = 64 * 2**20

Tier = Literal["plain", "per-layer"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Base(_Record):
    """The model a plan is for."""

    source: str
    model_type: str
    fingerprint: str


class CalibrationRecord(_Record):
    """The text a plan rests on; ``fingerprint`` is that of the token windows."""

    source: str
    samples: int = Field(ge=1)
    length: int = Field(ge=2)
    seed: int
    tokens: int
    fingerprint: str

    def choice(self) -> Calibration:
        """The choice of text that led to these tokens."""
        return Calibration(self.source, self.samples, self.length, self.seed)


class MethodRecord(_Record):
    """A method's name and all of its fields."""

    name: str
    options: dict[str, int | float | str]


class Budget(_Record):
    """What was asked for and what the sizes add up to.

    Attributes:
        keep: share asked for.
        of: what is counted; the parameters of all units.
        total: that count in the dense model.
        reached: count of the plan's sizes divided by ``total``.
    """

    keep: float = Field(ge=0, le=1)
    of: Literal["parameters"] = "parameters"
    total: int
    reached: float


class Row(_Record):
    """One unit: its size before and after, what it costs then, and the error it should make."""

    unit: str
    kind: str
    before: int = Field(ge=1)
    after: int = Field(ge=1)
    parameters: int
    bytes: int
    flops_per_token: int
    cache_bytes_per_token: int
    predicted_error: float


class Plan(_Record):
    """Sizes for all units of one model, and where they came from."""

    version: Literal[1] = 1
    secateur: str
    base: Base
    calibration: CalibrationRecord
    method: MethodRecord
    multiple_of: int = Field(ge=1)
    budget: Budget
    tier: Tier
    units: tuple[Row, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """Unit name to size."""
        return {row.unit: row.after for row in self.units}

    def build_method(self) -> Method:
        """The method object that this plan was made with."""
        kind, options = method_class(self.method.name), dict[str, Any](self.method.options)
        known = {f.name for f in fields(kind)}
        for name in sorted(set(options) - known):
            raise InputError(f"plan: {kind.name} has no option {name!r}. {nearest(name, known)}")
        return kind(**options)

    def to_json(self) -> str:
        """Indented JSON, one field a line."""
        return self.model_dump_json(indent=1) + "\n"


def fingerprint(model: Model) -> str:
    """Hash of the weights: every tensor's name, shape and up to 4096 of its numbers."""
    assert model.blocks  # seen as blocks, fused weights have one set of names
    digest = hashlib.sha256(str(model.config.model_type).encode())
    for name, parameter in model.module.named_parameters():
        flat = parameter.detach().flatten()
        picked = flat[:: max(1, len(flat) // 4096)].to("cpu", model.stored)
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(picked.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def measure_curves(
    model: Model,
    method: Method,
    store: Store,
    multiple_of: int = 8,
    advance: Callable[[int], None] = lambda _: None,
) -> Evidence:
    """Every unit's predicted error at every size, and every block's influence.

    One set of curves serves every budget. ``advance`` is told how many blocks are done.
    """
    units = model.units(multiple_of)
    needs = method.needs | method.allocator.needs
    curves: dict[str, Curve] = {}
    influence: list[float] = []
    for block in model.blocks:
        statistics = store.get(block.index, needs, model.device)
        if Needs.INFLUENCE in statistics:
            influence.append(float(statistics[Needs.INFLUENCE].mean))
        for unit in units:
            if unit.block == block.index:
                curves[unit.name] = method.solve(unit, block, statistics).curve
        advance(1)
    return Evidence(curves, influence)


def make_plan(
    model: Model,
    method: Method,
    evidence: Evidence,
    calibration: Calibration,
    tokens: Tokens,
    multiple_of: int = 8,
) -> Plan:
    """Decide the size of every unit from the evidence; no weight is touched.

    Raises:
        InputError: the budget is out of reach.
    """
    units = model.units(multiple_of)
    sizes = method.allocator.allocate(units, evidence, method.keep)
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
        method=MethodRecord(name=method.name, options=asdict(method)),
        multiple_of=multiple_of,
        budget=_budget(units, sizes, method.keep),
        tier=tier_of(units, sizes),
        units=tuple(_row(unit, sizes, evidence.curves, model.stored) for unit in units),
    )


def _budget(units: Sequence[Unit], sizes: Mapping[str, int], keep: float) -> Budget:
    total = sum(unit.parameters(unit.size) for unit in units)
    kept = sum(unit.parameters(sizes[unit.name]) for unit in units)
    return Budget(keep=keep, total=total, reached=kept / total)


def _row(
    unit: Unit, sizes: Mapping[str, int], curves: Mapping[str, Curve], stored: torch.dtype
) -> Row:
    size = sizes[unit.name]
    error = 0.0 if size == unit.size else curves[unit.name].at(size)
    cost = asdict(unit.cost(size, stored.itemsize))
    return Row(
        unit=unit.name,
        kind=unit.kind,
        before=unit.size,
        after=size,
        predicted_error=error,
        **cost,
    )


def tier_of(units: Sequence[Unit], sizes: Mapping[str, int]) -> Tier:
    """ "plain" where stock classes can express the sizes: one MLP width, attention untouched."""
    widths = {sizes[unit.name] for unit in units if unit.kind == "mlp"}
    attention = all(sizes[unit.name] == unit.size for unit in units if unit.kind != "mlp")
    return "plain" if attention and len(widths) == 1 else "per-layer"


def read_plan(path: Path) -> Plan:
    """Read a plan file.

    Raises:
        InputError: the file is missing, too large, no JSON, or not a plan of this version.
    """
    try:
        if path.stat().st_size > MAX_PLAN_BYTES:
            raise InputError(f"plan {str(path)!r} is larger than any plan; is it the right file?")
        return Plan.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"plan {str(path)!r}: {error.strerror}.") from error
    except pydantic.ValidationError as error:
        first: Any = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise InputError(f"plan {str(path)!r}: {where}: {first['msg']}.") from error


def revise(plan: Plan, model: Model, evidence: Evidence) -> Plan:
    """Recompute what follows from the sizes of a plan that may have been edited.

    Raises:
        InputError: the plan is for another model, or a size is not allowed.
    """
    units = check_sizes(plan, model)
    rows = tuple(_row(unit, plan.sizes, evidence.curves, model.stored) for unit in units)
    return plan.model_copy(
        update={
            "units": rows,
            "budget": _budget(units, plan.sizes, plan.budget.keep),
            "tier": tier_of(units, plan.sizes),
        }
    )


def check_sizes(plan: Plan, model: Model) -> list[Unit]:
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
    return match_units(plan, model)


def match_units(plan: Plan, model: Model) -> list[Unit]:
    """The part of :func:`check_sizes` that needs no weights.

    Raises:
        InputError: unknown or missing units, or a size that a unit may not take.
    """
    units = {unit.name: unit for unit in model.units(plan.multiple_of)}
    named = [row.unit for row in plan.units]
    if len(set(named)) != len(named) or set(named) != set(units):
        odd = sorted(set(named) ^ set(units)) or sorted({n for n in named if named.count(n) > 1})
        raise InputError(f"the plan does not name every unit once; look at {odd[0]!r}.")
    for row in plan.units:
        allowed = units[row.unit].sizes()
        if row.after not in allowed:
            close = min(allowed, key=lambda size: abs(size - row.after))
            raise InputError(
                f"plan, {row.unit}: size {row.after} is not allowed; the nearest is {close}."
            )
    return list(units.values())
