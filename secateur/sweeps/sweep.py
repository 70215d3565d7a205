"""A sweep from end to end: finished runs, remaining runs, and their comparison."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from secateur.data.tokens import Calibration, expanded
from secateur.evaluate.measurements import Questions
from secateur.io.run_directory import write_whole
from secateur.methods.step import Step
from secateur.models.loading import check_out, skeleton
from secateur.models.model import Model, Settings
from secateur.pipeline.config import RunConfig
from secateur.pipeline.context import RunContext
from secateur.pipeline.prepare import check_reach
from secateur.pipeline.run_inputs import RunInputs
from secateur.pipeline.run_record import recorded
from secateur.planning.recipe import Recipe
from secateur.report.frontier_table import SHEETS, compare
from secateur.report.html.content import standalone
from secateur.report.html.sheet import write_frontier
from secateur.sweeps.folder import Folder
from secateur.sweeps.job import Job
from secateur.sweeps.local import Outcome, one_by_one, side_by_side
from secateur.sweeps.on_ray import Cluster, load, on_ray
from secateur.sweeps.order import SweepRun, in_steps, placed
from secateur.utils.errors import InputError
from secateur.utils.progress import Progress

Way = Callable[[Sequence[Job]], Iterable[Outcome]]


@dataclass
class Sweep:
    """The runs of a sweep on one model, checked but not started.

    Attributes:
        runs: name → steps, as they were asked for.
        finished: names of those that are done.
        places: the others, in the order in which they are done.
        failed: name → why it could not be done, at first of those that can be told now.
    """

    inputs: RunInputs
    folder: Folder
    runs: Mapping[str, Recipe]
    finished: list[str]
    places: list[SweepRun]
    failed: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        source: str,
        out: Path,
        runs: Mapping[str, Recipe],
        *,
        calibration: Calibration | None = None,
        questions: Questions | None = None,
        settings: Settings | None = None,
        context: RunContext | None = None,
    ) -> "Sweep":
        """Check everything that can be checked before a weight is read.

        What the runs have in common is as in :class:`~secateur.pipeline.config.RunConfig`.

        Raises:
            InputError: anything wrong with what the runs have in common, or a run lies there that
                was made otherwise.
        """
        folder = Folder(expanded(out))
        context = replace(context or RunContext(), shared=folder.shared)
        first, recipe = next(iter(runs.items()))
        config = RunConfig(
            source,
            folder.out / first,
            recipe,
            calibration=calibration,
            questions=questions,
            settings=settings or Settings(),
            overwrite=True,
        )
        inputs = RunInputs.of(config, context)
        check_out(folder.out, [*inputs.files])
        folder.check(inputs.fingerprint())
        shapes, settings = skeleton(inputs.source, inputs.settings), inputs.settings
        settings.torch_dtype(shapes.stored), settings.torch_device()  # or every run would say so
        given = (inputs.model.calibration, inputs.questions, settings)
        finished, failed = [], {}
        with context.progress.stage("looking at the runs", len(runs)) as advance:
            for name, recipe in runs.items():
                if folder.finished(name, recorded(inputs.source, recipe, *given)):
                    finished.append(name)
                elif (reason := _obstacle(shapes, recipe)) is not None:
                    failed[name] = reason
                advance(1)
        left = {n: r for n, r in runs.items() if n not in {*finished, *failed}}
        places = placed(left, inputs.model.calibration.select)
        return cls(inputs, folder, runs, finished, places, failed=failed)

    def jobs(self) -> list[Job]:
        """The remaining jobs, in order."""
        shared, command = self.folder.shared, self.inputs.context.command
        return [
            Job(place.name, self._config(place), shared, place.after, command)
            for place in self.places
        ]

    def _config(self, place: SweepRun) -> RunConfig:
        """The config of one run."""
        recipe, inputs = self.runs[place.name], self.inputs
        steps = {} if in_steps(recipe) else _only_step(recipe, place, self.folder.shared)
        return RunConfig(
            inputs.source,
            self.folder.out / place.name,
            **{"method": recipe, **steps},
            calibration=inputs.model.calibration,
            questions=inputs.questions,
            settings=inputs.settings,
        )

    def listed(self) -> dict[str, Any]:
        """The planned runs as plain data."""
        places = {place.name: place for place in self.places}
        order = [*self.finished, *places, *self.failed]
        return {
            "model": self.inputs.source,
            "out": str(self.folder.out),
            "runs": [
                {
                    "name": name,
                    "steps": [step.as_dict() for step in self.runs[name].steps],
                    "keep": _keep_of(self.runs[name]),
                    "state": "finished"
                    if name in self.finished
                    else "refused"
                    if name in self.failed
                    else "to do",
                    "statistics_of": places[name].reads if name in places else None,
                    "scores_of": places[name].scores if name in places else None,
                    "reason": self.failed.get(name),
                }
                for name in order
            ],
        }

    def do(self, way: Way) -> dict[str, Any]:
        """Run the remaining jobs, compare the finished runs, and return the comparison as plain
        data.

        A run that fails does not end the others.

        Raises:
            InputError: another sweep is at work in the folder, its runs had something else in
                common, or the dense model can't be measured.
        """
        inputs, progress = self.inputs, self.inputs.context.progress
        with self.folder.opened(inputs.fingerprint()):
            if self.finished:
                progress.say(f"{len(self.finished)} of {len(self.runs)} runs are finished already")
            refused = set(self.failed)
            for name, reason in self.failed.items():
                progress.say(f"{name} can't be done: {reason}")
            if self.places:
                inputs.judge_dense()
            for job, why in way(self.jobs()):
                if why is None:
                    self.finished.append(job.name)
                else:
                    self.failed[job.name] = why
                progress.say(f"{job.name}: {'done' if why is None else f'failed: {why}'}")
            content = self._compared()
            if set(self.failed) == refused:  # nothing that could still go on
                self.folder.clear()
        return content

    def _compared(self) -> dict[str, Any]:
        """Table, picture and page of the finished runs."""
        out, names = self.folder.out, [name for name in self.runs if name in self.finished]
        content: dict[str, Any] = {"out": str(out), "failed": self.failed}
        if names:
            found = compare([out / name for name in names])
            content = {**found, **content}
            page, picture, table = (out / name for name in SHEETS)
            write_whole(picture, standalone(found))
            write_frontier(page, content, self.inputs.context.command)
            write_whole(table, json.dumps(content, indent=1) + "\n")
        return content


def locally(progress: Progress, folder: Folder, jobs: int) -> Way:
    """Run jobs one after the other in this process or, with ``jobs`` > 1, in parallel processes."""
    if jobs == 1:
        return lambda given: one_by_one(given, progress)
    return lambda given: side_by_side(given, progress, jobs, folder.shared / "logs")


def by_ray(progress: Progress, cluster: Cluster) -> Way:
    """Run jobs as tasks of Ray.

    Raises:
        InputError: it is not installed.
    """
    load()
    return lambda given: on_ray(given, progress, cluster) if given else ()


def _only_step(recipe: Recipe, place: SweepRun, shared: Path) -> dict[str, Any]:
    """Config fields of a run with one step."""
    (step,) = recipe.steps
    assert isinstance(step, Step)
    kept = None if place.statistics is None else shared / "statistics" / place.statistics
    return {
        "method": step.method,
        "budget": step.budget,
        "allocator": step.allocator,
        "statistics": kept,
    }


def _keep_of(recipe: Recipe) -> float | str | None:
    """The keep of a run: of all steps together, or of the last."""
    last = recipe.steps[-1]
    return recipe.keep or (last.budget.keep if isinstance(last, Step) else None)


def _obstacle(shapes: Model, recipe: Recipe) -> str | None:
    """Why a run with one method is not possible, as far as shapes show."""
    if in_steps(recipe):
        return None
    (step,) = recipe.steps
    assert isinstance(step, Step)
    try:
        check_reach(shapes, step)
    except InputError as error:
        return str(error)
    return None
