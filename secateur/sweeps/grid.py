"""Sweep files: every list makes one run per value."""

from collections.abc import Iterator
from itertools import product
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

import pydantic
from pydantic import Field, field_validator, model_validator

from secateur.data.tokens import expanded
from secateur.io.safe_parse import parse_yaml, read_bytes
from secateur.io.schema import Record, reading, said
from secateur.planning.recipe import (
    MAX_BYTES,
    Recipe,
    StepRecord,
    gathered,
    least_for_zero,
    read_recipe,
    share_of_all,
)
from secateur.structure.budget import Budget
from secateur.sweeps.names import Asked, named
from secateur.utils.errors import InputError

MOST = 1000  # runs

T = TypeVar("T")
Several: TypeAlias = T | Annotated[tuple[T, ...], Field(min_length=1, max_length=MOST)]
Share = Annotated[float, Field(ge=0, le=1)]
Word = Annotated[str, Field(max_length=200)]
Value = int | float | Word

Keeps = Several[Share | Literal["least"]]
#: where a sweep file keeps what a flag says, by the name of the flag's parameter
PLACES = {
    "calibration": ("calibration", "source"),
    "samples": ("calibration", "samples"),
    "length": ("calibration", "length"),
    "seed": ("calibration", "seed"),
    "select_calibration": ("calibration", "select"),
    "texts": ("evaluate", "texts"),
    "eval_length": ("evaluate", "length"),
    "eval_windows": ("evaluate", "windows"),
    "prompt": ("evaluate", "prompt"),
    "new_tokens": ("evaluate", "new_tokens"),
    "no_speed": ("evaluate", "speed"),
    "tasks": ("evaluate", "tasks"),
    "task_limit": ("evaluate", "task_limit"),
    "damage": ("evaluate", "damage"),
    "device": ("settings", "device"),
    "dtype": ("settings", "dtype"),
    "revision": ("settings", "revision"),
    "stream": ("settings", "stream"),
}


class RunsRecord(Record):
    """Runs of one method, or of one recipe."""

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,59}$")
    method: Several[Word] | None = None
    options: dict[str, Several[Value]] = Field(default_factory=dict)
    allocator: Several[Word] | None = None
    allocator_options: dict[str, Several[Value]] = Field(default_factory=dict)
    budget: dict[str, Several[Value] | None] = Field(default_factory=dict)
    steps: tuple[StepRecord, ...] | None = None
    recipe: Word | None = None

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, content: Any) -> Any:
        return gathered(content)

    def asked(self, keep: Keeps | None) -> Iterator[Asked]:
        """Every run; ``keep`` is the sweep's, for what has none of its own.

        Raises:
            InputError: it is not one of a method, steps and a recipe, or none of the kind.
        """
        given = [name for name in ("method", "steps", "recipe") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise InputError(f"sweep: runs have one of method, steps and recipe; here: {found}.")
        keeps = _each(self.budget.get("keep", keep))
        if self.method is not None:
            yield from self._of_methods(keeps)
            return
        beside = self.model_fields_set | {*self.budget}
        beside -= {"name", "budget", "keep", *given}
        if beside:
            raise InputError(
                f"sweep: {min(beside)} stands beside {given[0]}, whose steps say that themselves."
            )
        for one in keeps:
            try:
                keep = Budget(keep=one).keep
                if self.recipe is not None:
                    made = read_recipe(expanded(self.recipe), keep)
                else:
                    steps = tuple(step.step() for step in self.steps or ())
                    made = Recipe(steps, None if keep is None else share_of_all(keep))
            except InputError as error:
                raise InputError(_told(error)) from error
            usual = made.name if self.recipe is None else Path(self.recipe).stem
            yield Asked(self.name or usual, made, made.keep)

    def _of_methods(self, keeps: tuple[float | str | None, ...]) -> Iterator[Asked]:
        axes: dict[tuple[str, ...], tuple[Any, ...]] = {
            (name,): _each(getattr(self, name)) for name in ("method", "allocator")
        }
        for group in ("budget", "options", "allocator_options"):
            axes |= {(group, name): _each(v) for name, v in getattr(self, group).items()}
        axes["budget", "keep"] = keeps  # last, so that runs of one kind stand together
        axes["budget", "keep"] = axes.pop(("budget", "keep"))
        if prod(map(len, axes.values())) > MOST:
            raise InputError(f"sweep: more than {MOST} runs; make it several sweeps.")
        for values in product(*axes.values()):
            yield self._of_method(dict(zip(axes, values, strict=True)))

    def _of_method(self, values: dict[tuple[str, ...], Any]) -> Asked:
        """One run with one method, as ``secateur compress`` does it."""
        content: dict[str, Any] = {"options": {}, "allocator_options": {}, "budget": {}}
        for (name, *option), value in values.items():
            if option:
                content[name][option[0]] = value
            else:
                content[name] = value
        try:
            step = StepRecord.model_validate(content).step().filled
            made = Recipe((step,))
        except pydantic.ValidationError as error:
            raise InputError(f"sweep: {said(error)}.") from error
        except InputError as error:
            raise InputError(_told(error)) from error
        keep = step.budget.share
        return Asked(self.name or step.method.name, made, None if isinstance(keep, str) else keep)


class TextPart(Record):
    """The calibration data."""

    source: Word | None = None
    samples: int | None = Field(default=None, ge=1)
    length: int | None = Field(default=None, ge=2)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    select: Word | None = None


class JudgePart(Record):
    """What to evaluate."""

    texts: tuple[Word, ...] | None = None
    length: int | None = Field(default=None, ge=2)
    windows: int | None = Field(default=None, ge=1)
    prompt: str | None = None
    new_tokens: int | None = Field(default=None, ge=1)
    speed: bool | None = None
    tasks: tuple[Word, ...] | None = None
    task_limit: int | None = Field(default=None, ge=2)
    damage: bool | None = None


class OpenPart(Record):
    """How to load the model. ``trust_remote_code`` is allowed on the command line only."""

    device: Word | None = None
    dtype: Word | None = None
    revision: Word | None = None
    stream: Literal["auto", "on", "off"] | None = None


class SweepRecord(Record):
    """The content of a sweep file."""

    version: Literal[1] = 1
    model: str | None = None
    keep: Keeps | None = None
    runs: Annotated[tuple[RunsRecord, ...], Field(min_length=1, max_length=MOST)]
    calibration: TextPart = TextPart()
    evaluate: JudgePart = JudgePart()
    settings: OpenPart = OpenPart()

    @field_validator("keep", mode="before")
    @classmethod
    def _least(cls, keep: Any) -> Any:
        return least_for_zero(keep)

    def asked(self) -> dict[str, Recipe]:
        """Every run by its name, each once.

        Raises:
            InputError: an unknown name or option, too many runs, or two of one name.
        """
        found: list[Asked] = []
        for entry in self.runs:
            found += entry.asked(self.keep)
            if len(found) > MOST:
                raise InputError(f"sweep: more than {MOST} runs; make it several sweeps.")
        return named(found)

    def options(self) -> dict[str, Any]:
        """The values that replace command-line options, by parameter name."""
        found = {}
        for option, (part, name) in PLACES.items():
            value = getattr(getattr(self, part), name)
            if value is not None:
                found[option] = not value if option == "no_speed" else value
        return found


def read_sweep(path: Path) -> SweepRecord:
    """Read a sweep file (YAML).

    Raises:
        InputError: the file is missing, too large, no YAML, or no sweep.
    """
    with reading(path, "sweep", " docs/sweeps.md shows one."):
        content = parse_yaml(read_bytes(path, MAX_BYTES, "sweep"))
        if isinstance(content, dict) and "steps" in content and "runs" not in content:
            raise InputError(
                f"sweep {str(path)!r}: this is a recipe. secateur sweep MODEL OUT --recipe {path} "
                f"follows it at every --keep."
            )
        return SweepRecord.model_validate(content)


def _each(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _told(error: InputError) -> str:
    return f"sweep: {str(error).removeprefix('recipe: ')}"
