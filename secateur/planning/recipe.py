"""A recipe: several methods one after the other, under one budget of bytes."""

from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from secateur.allocate import allocator_class
from secateur.allocate.base import Allocator
from secateur.io.safe_parse import parse_yaml, read_bytes
from secateur.io.schema import Record, reading
from secateur.methods import method_class
from secateur.methods.base import Method
from secateur.pipeline.prepare import chosen_allocator
from secateur.structure.budget import Goal
from secateur.structure.units import MATRICES
from secateur.utils.errors import InputError
from secateur.utils.options import built

MAX_BYTES = 2**17
Options = dict[str, int | float | str]


@dataclass(frozen=True)
class Step:
    """One method on what the steps before it have left.

    Attributes:
        method: with its options; ``keep`` counts only where the recipe says it.
        goal: what its own budget counts.
        allocator: what spends that.
        keep: share of what the step finds; None where the recipe's budget decides, or where a
            method leaves as little as its forms allow.
    """

    method: Method
    goal: Goal
    allocator: Allocator
    keep: float | None = None

    @classmethod
    def of(
        cls,
        method: Method,
        keep: float | None = None,
        goal: Goal | None = None,
        allocator: Allocator | None = None,
    ) -> "Step":
        """A step with the usual goal and allocator where none is given."""
        goal = goal or Goal("bytes")
        return cls(method, goal, chosen_allocator(method, goal, allocator), keep)

    def with_keep(self, keep: float) -> Method:
        """The method with another budget."""
        return replace(self.method, keep=keep)

    def as_dict(self) -> dict[str, Any]:
        """Plain data that :func:`read_recipe` understands."""
        return {
            "method": self.method.name,
            "options": {k: v for k, v in asdict(self.method).items() if k != "keep"},
            "keep": self.keep,
            "allocator": self.allocator.name,
            "allocator_options": asdict(self.allocator),
            "target": self.goal.target,
            "tier": self.goal.tier,
            "multiple_of": self.goal.multiple_of,
            "latency_batch": self.goal.batch,
            "latency_length": self.goal.length,
            "runtime": self.goal.runtime,
        }


@dataclass(frozen=True)
class Recipe:
    """Steps, and the share of the bytes in blocks that stays behind all of them.

    Each step starts from the checkpoint that the one before it has written, and its statistics are
    those of that. One step may go without a ``keep`` of its own: it then takes what the others
    leave of ``keep``. Steps that narrow come before those that give matrices another form, integers
    last.

    Raises:
        InputError: there is no step, or not exactly one that the budget could decide.
    """

    steps: tuple[Step, ...]
    keep: float | None = None

    def __post_init__(self) -> None:
        if not self.steps:
            raise InputError("a recipe has at least one step, e.g. `- method: auto`.")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise InputError(f"recipe: keep {self.keep!r} should be above 0 and at most 1.")
        for step, following in pairwise(self.steps):
            if step.method.final:
                raise InputError(
                    f"recipe: behind {step.method.name}, which leaves integers, no step can go on "
                    f"and keep them; make it the last."
                )
            if step.method.kinds == MATRICES != following.method.kinds:
                raise InputError(
                    f"recipe: {following.method.name} narrows, and behind {step.method.name} only "
                    f"methods of forms can go on from what is compressed already; put it before."
                )
        open_ones = [step.method.name for step in self.steps if _open(step)]
        if self.keep is None and open_ones:
            raise InputError(
                f"recipe: nothing says how much {open_ones[0]} keeps; give that step a keep, or "
                f"the recipe one (--keep) for all steps together."
            )
        if len(open_ones) > 1:
            raise InputError(
                f"recipe: {' and '.join(open_ones)} both have no keep, and one budget decides one "
                f"of them; give all but one a keep."
            )

    @property
    def open(self) -> int | None:
        """The step that the budget decides."""
        found = [index for index, step in enumerate(self.steps) if _open(step)]
        return found[0] if found else None


def _open(step: Step) -> bool:
    """Whether nothing in the step says what it leaves: a keep, or forms of one size."""
    return step.keep is None and step.method.keep > 0


class StepRecord(Record):
    """A step in a file."""

    method: str
    options: Options = Field(default_factory=dict)
    keep: float | None = Field(default=None, gt=0, le=1)
    allocator: str | None = None
    allocator_options: Options = Field(default_factory=dict)
    target: str = "bytes"
    tier: str = "per-layer"
    multiple_of: int = Field(default=8, ge=1)
    latency_batch: int = Field(default=1, ge=1)
    latency_length: int = Field(default=256, ge=1)
    runtime: str = "transformers"

    def step(self) -> Step:
        """The objects that it names.

        Raises:
            InputError: an unknown name or option.
        """
        kind, what = method_class(self.method), f"recipe: method {self.method}"
        method = built(kind, self.options, what, beside=("keep",))
        goal = Goal(
            self.target,  # type: ignore[arg-type]
            self.tier,  # type: ignore[arg-type]
            self.multiple_of,
            self.latency_batch,
            self.latency_length,
            self.runtime,  # type: ignore[arg-type]
        )
        allocator: Allocator | None = None
        if self.allocator is not None:
            what, spender = f"recipe: allocator {self.allocator}", allocator_class(self.allocator)
            allocator = built(spender, self.allocator_options, what)
        elif self.allocator_options:
            raise InputError("recipe: allocator_options without an allocator; name one.")
        return Step.of(method, self.keep, goal, allocator)


class RecipeRecord(Record):
    """A recipe in a file; what else a run's own recipe.yaml holds is left to the command line."""

    version: Literal[3] = 3
    keep: float | None = Field(default=None, gt=0, le=1)
    steps: tuple[StepRecord, ...]
    model: str | None = None
    calibration: dict[str, Any] | None = None
    evaluate: dict[str, Any] | None = None
    settings: dict[str, Any] | None = None


def read_recipe(path: Path, keep: float | None = None) -> Recipe:
    """Read a YAML file; ``keep`` takes the place of the budget in it.

    Raises:
        InputError: the file is missing, too large, no YAML, or no recipe.
    """
    with reading(path, "recipe", " docs/recipes.md shows one."):
        found = RecipeRecord.model_validate(parse_yaml(read_bytes(path, MAX_BYTES, "recipe")))
    steps = tuple(step.step() for step in found.steps)
    return Recipe(steps, found.keep if keep is None else keep)
