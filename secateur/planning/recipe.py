"""A recipe: several methods one after the other, under one budget of bytes."""

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeGuard

from pydantic import Field, model_validator

from secateur.allocate import allocator_class
from secateur.allocate.base import Allocator
from secateur.io.safe_parse import parse_yaml, read_bytes
from secateur.io.schema import Record, reading
from secateur.methods import method_class
from secateur.methods.step import Step
from secateur.planning.stage import Stage
from secateur.structure.budget import KEYS, LEAST, Budget, Keep
from secateur.structure.units import MATRICES
from secateur.utils.errors import InputError
from secateur.utils.options import built

MAX_BYTES = 2**17
Options = dict[str, int | float | str]


@dataclass(frozen=True)
class Recipe:
    """Steps, and the share of the bytes in blocks that stays behind all of them.

    Each step starts from the checkpoint that the one before it has written, and its statistics are
    those of that. One step may go without a ``keep`` of its own: it then takes what the others
    leave of ``keep``. A step's budget counts bytes unless it says something else. Steps that prune
    come before those that give matrices another form, integers last. Any other :class:`Stage` may
    stand between them; what it leaves of the bytes is known once it is done.

    Raises:
        InputError: there is no step, or not exactly one that the budget could decide.
    """

    steps: tuple[Step | Stage, ...]
    keep: float | None = None

    def __post_init__(self) -> None:
        if not self.steps:
            raise InputError("a recipe has at least one step, e.g. `- method: auto`.")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise InputError(f"recipe: keep {self.keep!r} should be above 0 and at most 1.")
        if not any(isinstance(step, Step) for step in self.steps):
            raise InputError(
                "recipe: none of its steps has a method; add one, Step.of(Auto()) for one."
            )
        counted = tuple(_in_bytes(step) for step in self.steps)
        object.__setattr__(self, "steps", counted)
        for step, following in pairwise(self.steps):
            if not isinstance(step, Step) or not isinstance(following, Step):
                continue
            if step.method.final:
                raise InputError(
                    f"recipe: behind {step.method.name}, which leaves integers, no step can go on "
                    f"and keep them; make it the last."
                )
            if step.method.kinds == MATRICES != following.method.kinds:
                raise InputError(
                    f"recipe: {following.method.name} prunes, and behind {step.method.name} only "
                    f"methods of forms can go on from what is compressed already; put it before."
                )
        open_ones = [step.method.name for step in self.steps if is_open(step)]
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
    def name(self) -> str:
        """The names of its steps."""
        names = (s.method.name if isinstance(s, Step) else s.name for s in self.steps)
        return "+".join(names)

    def with_budget(self, budget: Budget | None) -> "Recipe":
        """The recipe with the ``keep`` of a budget, if there is one, in the place of its own.

        Raises:
            InputError: the budget says something else, which each step has for itself.
        """
        if budget is None:
            return self
        if replace(budget, keep=None) != Budget():
            raise InputError("the steps of a recipe have their own budgets; give `keep` alone.")
        return self if budget.keep is None else replace(self, keep=share_of_all(budget.keep))

    @property
    def open(self) -> int | None:
        """The place of the step that the budget decides."""
        found = [index for index, step in enumerate(self.steps) if is_open(step)]
        return found[0] if found else None

    @property
    def open_step(self) -> Step | None:
        """The step that the budget decides."""
        return next((step for step in self.steps if is_open(step)), None)


def share_of_all(keep: Keep) -> float:
    """A ``keep`` as that of a whole recipe.

    Raises:
        InputError: it is "least", which is for the forms of one method.
    """
    if isinstance(keep, str):
        raise InputError(f"recipe: keep {keep!r} is for a step; name a share for all of them.")
    return keep


def is_open(step: Step | Stage) -> TypeGuard[Step]:
    """Whether nothing in a step says what it leaves: a keep, or forms of one size."""
    if not isinstance(step, Step):
        return False
    return step.budget.keep is None and step.method.usual_keep != LEAST


def _in_bytes(step: Step | Stage) -> Step | Stage:
    """A step that counts bytes where its budget does not say what it counts."""
    if not isinstance(step, Step) or step.budget.target is not None:
        return step
    return replace(step, budget=replace(step.budget, target="bytes"))


class StepRecord(Record):
    """A step in a file: the fields of a budget stand among those of the step."""

    method: str
    options: Options = Field(default_factory=dict)
    allocator: str | None = None
    allocator_options: Options = Field(default_factory=dict)
    budget: dict[str, float | int | str | None] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, content: Any) -> Any:
        return gathered(content)

    def step(self) -> Step:
        """The objects that it names.

        Raises:
            InputError: an unknown name or option.
        """
        kind, what = method_class(self.method), f"recipe: method {self.method}"
        method = built(kind, self.options, what)
        allocator: Allocator | None = None
        if self.allocator is not None:
            what, spender = f"recipe: allocator {self.allocator}", allocator_class(self.allocator)
            allocator = built(spender, self.allocator_options, what)
        elif self.allocator_options:
            raise InputError("recipe: allocator_options without an allocator; name one.")
        return Step.of(method, Budget.from_dict(self.budget), allocator)


def gathered(content: Any) -> Any:
    """An object in a file, those of its entries that are fields of a budget in one of their own.

    A ``keep`` of 0 is what version 0.3.0 had for "least".
    """
    if not isinstance(content, dict) or "budget" in content:
        return content
    budget = {name: value for name, value in content.items() if name in KEYS}
    if "keep" in budget:
        budget["keep"] = least_for_zero(budget["keep"])
    return {k: v for k, v in content.items() if k not in KEYS} | {"budget": budget}


def least_for_zero(keep: Any) -> Any:
    """A ``keep`` in a file, or several, with "least" in place of 0."""
    if isinstance(keep, list):
        return [least_for_zero(one) for one in keep]
    return LEAST if keep == 0 and not isinstance(keep, bool) else keep


class RecipeRecord(Record):
    """A recipe in a file; what else a run's own recipe.yaml holds is left to the command line."""

    version: Literal[3] = 3
    keep: float | None = Field(default=None, gt=0, le=1)
    steps: tuple[StepRecord, ...]
    model: str | None = None
    calibration: dict[str, Any] | None = None
    evaluate: dict[str, Any] | None = None
    settings: dict[str, Any] | None = None


def read_recipe(path: Path, keep: Keep | None = None) -> Recipe:
    """Read a YAML file; ``keep`` takes the place of the budget in it.

    Raises:
        InputError: the file is missing, too large, no YAML, or no recipe.
    """
    with reading(path, "recipe", " docs/recipes.md shows one."):
        found = RecipeRecord.model_validate(parse_yaml(read_bytes(path, MAX_BYTES, "recipe")))
    steps = tuple(step.step() for step in found.steps)
    return Recipe(steps, found.keep if keep is None else share_of_all(keep))
