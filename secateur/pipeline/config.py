"""Everything that a person may ask of one run."""

from dataclasses import dataclass, field, fields
from pathlib import Path

from secateur.allocate.base import Allocator
from secateur.data.tokens import Calibration
from secateur.evaluate.measurements import Questions
from secateur.methods.base import Method
from secateur.methods.step import Step
from secateur.models.model import Settings
from secateur.planning.plan import Plan
from secateur.planning.recipe import Recipe
from secateur.structure.budget import Budget
from secateur.utils.errors import InputError


@dataclass(frozen=True)
class RunConfig:
    """What one run is asked to do.

    Attributes:
        source: folder or hub id of a model.
        out: folder for the result; it must not exist, unless ``overwrite``.
        method: for example ``Auto()``; a plan, to apply it without deciding anything again; or a
            recipe, which applies several methods one after the other.
        budget: how much stays, what that counts, and constraints on sizes; by default the method's
            usual. A plan brings its own, and of a recipe's only ``keep`` can be given here.
        allocator: what spends the budget over the units; by default the method's own.
        calibration: the calibration data; by default the bundled text.
        questions: what to measure; by default perplexity on two texts that calibration never sees,
            speed and a sample.
        settings: device and number format.
        scores: file to read the units' scores from, or to write them to if there is none; by
            default the user's cache.
        statistics: folder to keep the calibration's statistics in, or to find them in; by default
            they last as long as the run.
        overwrite: replace ``out`` once the new result is whole.

    Raises:
        InputError: two of them exclude each other.
    """

    source: str | Path
    out: str | Path
    method: Method | Plan | Recipe
    budget: Budget | None = None
    allocator: Allocator | None = None
    calibration: Calibration | None = None
    questions: Questions | None = None
    settings: Settings = field(default_factory=Settings)
    scores: Path | None = None
    statistics: Path | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.method, Plan):
            if self.budget is not None or self.allocator is not None:
                raise InputError("a plan brings its own budget and allocator; leave them out.")
            if self.calibration not in (None, self.method.calibration.choice()):
                raise InputError("a plan brings its own calibration; give one or the other.")
            object.__setattr__(self, "calibration", self.method.calibration.choice())
        elif isinstance(self.method, Recipe):
            beside = ("allocator", "scores", "statistics")
            if given := [name for name in beside if getattr(self, name) is not None]:
                raise InputError(f"the steps of a recipe bring their own {given[0]}; leave it out.")
            object.__setattr__(self, "method", self.method.with_budget(self.budget))
        elif not isinstance(self.method, Method):
            names = ", ".join(f.name for f in fields(self))
            raise InputError(
                f"method {self.method!r} is no Method, Plan or Recipe; the arguments are {names}."
            )

    @property
    def plan(self) -> Plan | None:
        """The plan to apply, if there is one."""
        return self.method if isinstance(self.method, Plan) else None

    @property
    def step(self) -> Step:
        """The method, budget and allocator of a run that is no recipe's, with nothing left open.

        Raises:
            InputError: the tier leaves the allocator nothing to allocate.
        """
        if isinstance(self.method, Plan):
            return self.method.build_step()
        assert isinstance(self.method, Method)
        return Step.of(self.method, self.budget, self.allocator).filled

    @property
    def recipe(self) -> Recipe:
        """The steps of the run; of one method a single one."""
        return self.method if isinstance(self.method, Recipe) else Recipe((self.step,))
