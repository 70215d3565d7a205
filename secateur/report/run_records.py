"""Finished runs on disk, read as untrusted input: report, plans and recipe."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, FailFast, Field, FiniteFloat, field_validator

from secateur.data.tokens import expanded
from secateur.io.safe_parse import HostileError, parse_json, read_bytes
from secateur.io.schema import said
from secateur.report.report import VERSION, Report, lines, task_rows
from secateur.utils.errors import InputError

MAX_BYTES = 2**26
LARGEST = 1e300  # of what is added, multiplied and drawn
RECORD = "secateur"
RATE = "_tokens_per_second"
MAX_VALUES = 2**20
Kind = TypeVar("Kind", bound=BaseModel)
T = TypeVar("T")
Several: TypeAlias = Annotated[list[T], FailFast()]
Count = Annotated[int, Field(ge=0, le=2**63)]
Amount = Annotated[FiniteFloat, Field(ge=0, le=LARGEST)]
Divisor = Annotated[FiniteFloat, Field(ge=1 / LARGEST, le=1e305)]  # a wrecked model's is exp(700)
Number = Annotated[int | FiniteFloat, Field(ge=-LARGEST, le=LARGEST)]
Figures = dict[str, Number | None]


class ReportPart(BaseModel):
    """Part of a report; keys of later versions are kept and ignored."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


class Side(ReportPart):
    """The figures of one model."""

    parameters: Count
    bytes: Count = Field(gt=0)
    perplexity: dict[str, Divisor]
    tokens: dict[str, Count] = {}
    texts: dict[str, str] = {}
    prompt: str = ""
    sample: str = ""
    peak_memory_bytes: Count = 0
    speed: dict[str, Amount] = {}
    counts: str = "tokens"
    tasks: dict[str, Amount] = {}
    agreement: dict[str, Amount] = {}
    task_scores: dict[str, Figures] = {}
    task_changes: dict[str, Figures] = {}
    damage: dict[str, dict[str, Number | dict[str, Any] | None]] = {}

    @field_validator("speed")
    @classmethod
    def _takes_time(cls, speed: dict[str, float]) -> dict[str, float]:
        for name, value in speed.items():
            if name.endswith(RATE) and value < 1 / LARGEST:
                raise ValueError(f"{name} is a rate, and above 0")
        return speed


class NamedOptions(ReportPart):
    """A method or an allocator with its options."""

    name: str
    options: dict[str, Any] = {}


class DenseModel(ReportPart):
    """The dense model."""

    source: str
    model_type: str = ""
    fingerprint: str = ""


class Spent(ReportPart):
    """A budget."""

    keep: Amount
    of: str = "parameters"
    total: Count = 0
    reached: Amount
    batch: Count = 1
    length: Count = 256


class Told(ReportPart):
    """Points of an error curve."""

    kept: Several[Amount]
    errors: Several[Amount]


class Observed(ReportPart):
    """The result of :func:`~secateur.apply.block_errors.observations` for a step."""

    influence: Several[Number] = []
    errors: Several[dict[str, Amount | None]] = []
    curves: dict[str, Told] = {}
    directions: Several[dict[str, Count]] = []


class Taken(ReportPart):
    """One of several steps."""

    method: NamedOptions
    allocator: NamedOptions | None = None
    budget: Spent | None = None


class Content(ReportPart):
    """report.json of this version and of earlier ones."""

    version: int = Field(ge=1, le=VERSION)
    model: DenseModel
    method: NamedOptions
    allocator: NamedOptions | None = None
    budget: Spent
    tier: str
    densified: Count = 0
    libraries: Several[str] = []
    dense: Side
    dense_shared: bool = False
    compressed: Side
    seconds: dict[str, Amount] = {}
    versions: dict[str, str] = {}
    calibration: dict[str, Any] = {}
    steps: Several[Taken] = []
    command: str | None = None
    observed: Several[Observed] = []


class UnitRow(BaseModel):
    """A row of a plan, as a page shows it."""

    unit: str
    kind: str
    before: Count
    after: Count
    bytes: Count = 0
    predicted_error: Amount = 0.0
    predicted_loss: Amount | None = None
    becomes: str | None = None
    dense_bytes: Count | None = None

    @property
    def kept(self) -> float:
        """The share that remains; for matrices, of bytes."""
        if self.dense_bytes:
            return self.bytes / self.dense_bytes
        return self.after / self.before if self.before else 1.0

    @property
    def said(self) -> str:
        """The size before and after as text."""
        return self.becomes or f"{self.before} → {self.after or 'removed'}"


class PlanRows(BaseModel):
    """A plan, as a page shows it."""

    units: Several[UnitRow]


@dataclass(frozen=True)
class Run:
    """The files that a run leaves beside its weights.

    Attributes:
        folder: the checkpoint.
        report: its report, every key of this version there.
        plans: the rows of each step's plan; those that can't be read are left out.
        recipe: recipe.yaml as it stands.
    """

    folder: Path
    report: Report
    plans: tuple[tuple[UnitRow, ...], ...] = ()
    recipe: str = ""


def read_run(folder: Path) -> Run:
    """Read the report, plans and recipe of a finished run in ``folder``.

    Raises:
        InputError: there is no report, or it is damaged, or of a later version.
    """
    folder = expanded(folder)
    record, named = folder / RECORD, f"run {str(folder)!r}"
    path = record / "report.json"
    if not folder.is_dir():
        raise InputError(f"{named}: there is no such folder. `secateur compress` writes one.")
    if record.is_symlink():
        raise InputError(f"{named}: {RECORD} in it is a link, and nothing is written through it.")
    if not path.is_file():
        raise InputError(
            f"{named}: there is no {RECORD}/report.json in it; give a folder that "
            f"`secateur compress` wrote."
        )
    content = _read(Content, path, named)
    seen = content.model_dump()
    for name in seen["dense"]["perplexity"].keys() ^ seen["compressed"]["perplexity"].keys():
        raise InputError(f"{named}: report.json: only one of the two models was read {name!r}.")
    try:  # that the two sides have the same, and the keys that are shown
        lines(Report(seen)), task_rows(Report(seen))
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise InputError(f"{named}: report.json is damaged: {error!r}.") from error
    found = [record / "plan.json"]
    if len(content.steps) > 1:
        found = [record / f"plan-{n}.json" for n in range(1, len(content.steps) + 1)]
    plans = [tuple(_read(PlanRows, p, named).units) for p in found if p.is_file()]
    recipe = record / "recipe.yaml"
    text = _text(recipe, named) if recipe.is_file() else ""
    return Run(folder, Report(seen), tuple(plans), text)


def _text(path: Path, named: str) -> str:
    try:
        return read_bytes(path, MAX_BYTES, path.name).decode("utf-8", "replace")
    except OSError as error:
        raise InputError(f"{named}: {path.name}: {error.strerror}.") from error
    except HostileError as error:
        raise InputError(f"{named}: {path.name}: {error}.") from error


def _read(kind: type[Kind], path: Path, named: str) -> Kind:
    try:
        return kind.model_validate(parse_json(read_bytes(path, MAX_BYTES, path.name), MAX_VALUES))
    except HostileError as error:
        raise InputError(f"{named}: {path.name}: {error}.") from error
    except OSError as error:
        raise InputError(f"{named}: {path.name}: {error.strerror}.") from error
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        if first["loc"] == ("version",) and first["type"] == "less_than_equal":
            raise InputError(
                f"{named}: {path.name} has version {first['input']}, and this Secateur knows "
                f"versions up to {VERSION}; upgrade it."
            ) from error
        raise InputError(f"{named}: {path.name}: {said(error)}.") from error
