"""The order of runs, so that later runs can use what earlier ones have measured."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from secateur.methods.step import Step
from secateur.planning.recipe import Recipe


@dataclass(frozen=True)
class SweepRun:
    """A run and what it shares with other runs.

    Attributes:
        name: the run.
        statistics: what its statistics are called; None where no other run can use them.
        reads: the run that fills that folder; None where it is this one.
        scores: the run whose scores it uses; None where it measures its own.
    """

    name: str
    statistics: str | None
    reads: str | None
    scores: str | None

    @property
    def after(self) -> frozenset[str]:
        """The jobs that must run before this one."""
        return frozenset(name for name in (self.reads, self.scores) if name is not None)


def placed(runs: Mapping[str, Recipe], select: str) -> list[SweepRun]:
    """Order runs so that those with the same statistics, and among these with the same scores,
    follow each other.

    Scores with measured losses also serve runs that need none, so they come first. Calibration
    windows that ``select`` chooses differ by run, so nothing is shared then.
    """
    alone = select != "none"
    steps = {name: _first(recipe) for name, recipe in runs.items()}
    folder = {n: _statistics(runs[n]) if not alone else None for n in runs}
    scores = {n: n if alone or step is None else _scores(step) for n, step in steps.items()}
    at = {name: number for number, name in enumerate(runs)}
    first: dict[str, int] = {}
    for name, number in at.items():
        for what in (folder[name] or name, scores[name]):
            first.setdefault(what, number)

    def key(name: str) -> tuple[int, int, bool, int]:
        own = folder[name] or name
        step = steps[name]
        unmeasured = step is None or not step.allocator.measured
        return first[own], first[scores[name]], unmeasured, at[name]

    found: list[SweepRun] = []
    filled: dict[str, str] = {}
    scored: dict[str, str] = {}
    for name in sorted(runs, key=key):
        own = folder[name]
        reads = None if own is None else filled.get(own)
        found.append(SweepRun(name, own, reads, scored.get(scores[name])))
        if own is not None:
            filled.setdefault(own, name)
        scored.setdefault(scores[name], name)
    return found


def in_steps(recipe: Recipe) -> bool:
    """Whether a run has several steps with their own statistics, or a common budget."""
    return len(recipe.steps) > 1 or recipe.keep is not None


def _first(recipe: Recipe) -> Step | None:
    """The method of the first step, if there is one."""
    step = recipe.steps[0]
    return step if isinstance(step, Step) else None


def _statistics(recipe: Recipe) -> str | None:
    """A name for the statistics that a run needs."""
    step = _first(recipe)
    if in_steps(recipe) or step is None:
        return None
    needs = sorted(need.id for need in step.method.needs | step.allocator.needs)
    return hashlib.sha256(" ".join(needs).encode()).hexdigest()[:12]


def _scores(step: Step) -> str:
    """What the scores of a step depend on, besides the model and the text."""
    options = step.as_dict()["options"]
    return repr((step.method.name, sorted(options.items()), step.allocator.reading))
