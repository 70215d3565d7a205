"""The plan: which unit gets which size. Plain data, readable, editable, replayable."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PrivateAttr, field_validator, model_validator

from secateur import allocate, methods
from secateur.allocate.base import Allocator
from secateur.data.tokens import Calibration
from secateur.io.run_directory import write_whole
from secateur.io.schema import Parts, Record, read_record
from secateur.layers.forms_secateur import FORMS
from secateur.layers.integers import INTEGERS, LIBRARY
from secateur.methods.base import Method
from secateur.methods.step import Step
from secateur.structure.budget import LEAST, Budget, Target, Tier, Written
from secateur.structure.selection import Selection
from secateur.utils.errors import InputError, shown
from secateur.utils.options import built
from secateur.utils.registry import Registry

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
            source=self.source,
            samples=self.samples,
            length=self.length,
            seed=self.seed,
            select=self.select,
            windows=self.windows,
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


class BudgetRecord(Record):
    """What was asked for and what the sizes add up to.

    Attributes:
        keep: share asked for; 0 for as little as there can be.
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
    """Sizes for all units of one model, and where they came from.

    Attributes:
        asked: the budget that was asked for, under the names of its fields in files.
        allocator: what decided the sizes; None where the method decides them itself.
        tier: what reads the sizes, whatever tier was asked for.
        selection: digest of the file beside the plan that says which channels, heads and pairs
            stay; None where the method chooses them by the sizes.
    """

    version: Literal[3] = 3
    secateur: str
    base: Base
    calibration: CalibrationRecord
    method: Choice
    allocator: Choice | None
    asked: dict[str, int | float | str]
    budget: BudgetRecord
    tier: Written
    units: Parts[Row]
    selection: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    _selected: Selection | None = PrivateAttr(None)

    @model_validator(mode="before")
    @classmethod
    def _of_version_2(cls, content: Any) -> Any:
        """A plan of 0.3.0 has what was asked for in several places."""
        if not isinstance(content, dict) or content.get("version") != 2:
            return content
        return _upgraded(content)

    @field_validator("asked")
    @classmethod
    def _is_a_budget(cls, asked: dict[str, int | float | str]) -> dict[str, int | float | str]:
        Budget.from_dict(asked)
        return asked

    @property
    def sizes(self) -> dict[str, int]:
        """Unit name to size."""
        return {row.unit: row.after for row in self.units}

    @property
    def selected(self) -> Selection | None:
        """What the file that ``selection`` names says; :func:`read_plan` reads it."""
        return self._selected

    def with_selection(self, selection: Selection | None) -> "Plan":
        """The same plan with these indices, or with none."""
        digest = None if selection is None else selection.digest
        found = self.model_copy(update={"selection": digest})
        found._selected = selection
        return found

    @property
    def asked_budget(self) -> Budget:
        """What was asked for, but for the tier: sizes that are given need no constraint."""
        tier: Tier = "plain" if self.tier == "plain" else "per-layer"
        return replace(Budget.from_dict(self.asked), tier=tier)

    def build_step(self) -> Step:
        """The method, budget and allocator that this plan was made with."""
        return Step(self.build_method(), self.asked_budget, self.build_allocator())

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
        if choice is None:
            return self.build_method().allocator
        return built(
            allocate.allocator_class(choice.name, choice.package),
            choice.options,
            f"plan: {choice.name}",
        )

    def to_json(self) -> str:
        """Indented JSON, one field a line."""
        return self.model_dump_json(indent=1) + "\n"


def _upgraded(content: dict[str, Any]) -> dict[str, Any]:
    """A plan of version 2 as one of today; what is missing or wrong in it stays so."""
    budget, method = content.get("budget"), content.get("method")
    if not isinstance(budget, dict) or not isinstance(method, dict):
        return content
    options = method.get("options")
    if not isinstance(options, dict):
        return content
    rest = {k: v for k, v in content.items() if k not in ("multiple_of", "runtime")}
    asked = {
        "keep": budget.get("keep") or LEAST,
        "target": budget.get("of"),
        "tier": "plain" if content.get("tier") == "plain" else "per-layer",
        "multiple_of": content.get("multiple_of", 8),
        "latency_batch": budget.get("batch", 1),
        "latency_length": budget.get("length", 256),
        "runtime": content.get("runtime", "transformers"),
    }
    options = {name: value for name, value in options.items() if name != "keep"}
    return {**rest, "version": 3, "asked": asked, "method": {**method, "options": options}}


def write_plan(plan: Plan, path: Path) -> None:
    """Write a plan file, and beside it the file of its selection if it has one.

    Raises:
        OSError: a file can't be written.
    """
    if plan.selected is not None:
        plan.selected.save(path.parent)
    write_whole(path, plan.to_json())


def read_plan(path: Path) -> Plan:
    """Read a plan file, and beside it the file of its selection if it names one.

    Raises:
        InputError: a file is missing, too large or damaged, the plan is no JSON or not of this
            version, or the selection is not the one that it names.
    """
    advice = " A new one comes from `secateur plan`."
    plan = read_record(Plan, path, "plan", MAX_PLAN_BYTES, advice)
    if plan.calibration.select != "none" and not plan.calibration.windows:
        raise InputError(
            f"plan {str(path)!r}: calibration.select is {shown(plan.calibration.select)}, and "
            f"calibration.windows does not say which windows that chose; list them, or set select "
            f"to 'none' for windows drawn at random.{advice}"
        )
    if plan.selection is not None:
        plan = plan.with_selection(Selection.load(path.parent, plan.selection))
    return plan
