"""A sweep from end to end: what is there, what is to do, the runs, and what came of them."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.cli import parse as asked
from secateur.data.tokens import Calibration, expanded
from secateur.evaluate.evaluator import Questions
from secateur.io.run_directory import write_whole
from secateur.models.loading import check_out, skeleton
from secateur.models.model import Model, Settings
from secateur.pipeline.compress import recorded
from secateur.pipeline.prepare import check_reach
from secateur.pipeline.run_inputs import Task
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
    """Runs on one model, looked at and not started.

    Attributes:
        runs: name → steps, as they were asked for.
        finished: names of those that are done.
        places: the others, in the order in which they are done.
        failed: name → why it could not be done, at first of those that can be told now.
    """

    task: Task
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
        calibration: Calibration,
        questions: Questions | None,
        settings: Settings,
        progress: Progress,
    ) -> "Sweep":
        """Look at all that can be looked at before a weight is read.

        Raises:
            InputError: anything wrong with what the runs have in common, or a run lies there that
                was made otherwise.
        """
        folder = Folder(expanded(out))
        place = folder.out / next(iter(runs))
        task = Task.of(
            source, place, calibration, questions, settings, progress, True, folder.shared
        )
        check_out(folder.out, [*task.files])
        folder.check(task.fingerprint())
        shapes = skeleton(task.source, settings)
        settings.torch_dtype(shapes.stored), settings.torch_device()  # or every run would say so
        given = (task.calibration, task.questions, task.settings)
        finished, failed = [], {}
        with progress.stage("looking at the runs", len(runs)) as advance:
            for name, recipe in runs.items():
                if folder.finished(name, recorded(task.source, recipe, *given)):
                    finished.append(name)
                elif (reason := _obstacle(shapes, recipe)) is not None:
                    failed[name] = reason
                advance(1)
        left = {n: r for n, r in runs.items() if n not in {*finished, *failed}}
        places = placed(left, task.calibration.select)
        return cls(task, folder, runs, finished, places, failed)

    def jobs(self) -> list[Job]:
        """What is to do, in order."""
        task, shared = self.task, self.folder.shared
        statistics = shared / "statistics"
        return [
            Job(
                place.name,
                self.runs[place.name],
                task.source,
                self.folder.out / place.name,
                task.calibration,
                task.questions,
                task.settings,
                shared,
                None if place.statistics is None else statistics / place.statistics,
                place.after,
                asked.COMMAND.get(),
            )
            for place in self.places
        ]

    def listed(self) -> dict[str, Any]:
        """Plain data about what would be done."""
        places = {place.name: place for place in self.places}
        order = [*self.finished, *places, *self.failed]
        return {
            "model": self.task.source,
            "out": str(self.folder.out),
            "runs": [
                {
                    "name": name,
                    "steps": [step.as_dict() for step in self.runs[name].steps],
                    "keep": self.runs[name].keep or self.runs[name].steps[-1].keep,
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
        """Do what is left, compare what is finished, and say so as plain data.

        A run that fails does not end the others.

        Raises:
            InputError: another sweep is at work in the folder, its runs had something else in
                common, or the dense model can't be measured.
        """
        task, progress = self.task, self.task.progress
        with self.folder.opened(task.fingerprint()):
            if self.finished:
                progress.say(f"{len(self.finished)} of {len(self.runs)} runs are finished already")
            refused = set(self.failed)
            for name, reason in self.failed.items():
                progress.say(f"{name} can't be done: {reason}")
            if self.places:
                task.judge_dense()
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
        """The table, the picture and the page of what is finished."""
        out, names = self.folder.out, [name for name in self.runs if name in self.finished]
        content: dict[str, Any] = {"out": str(out), "failed": self.failed}
        if names:
            found = compare([out / name for name in names])
            content = {**found, **content}
            page, picture, table = (out / name for name in SHEETS)
            write_whole(picture, standalone(found))
            write_frontier(page, content)
            write_whole(table, json.dumps(content, indent=1) + "\n")
        return content


def locally(progress: Progress, folder: Folder, jobs: int) -> Way:
    """One after the other in this process or, of several, each in a process of its own."""
    if jobs == 1:
        return lambda given: one_by_one(given, progress)
    return lambda given: side_by_side(given, progress, jobs, folder.shared / "logs")


def by_ray(progress: Progress, cluster: Cluster) -> Way:
    """As tasks of Ray.

    Raises:
        InputError: it is not installed.
    """
    load()
    return lambda given: on_ray(given, progress, cluster) if given else ()


def _obstacle(shapes: Model, recipe: Recipe) -> str | None:
    """Why a run of one method can't be done, as far as shapes tell."""
    if in_steps(recipe):
        return None
    (step,) = recipe.steps
    try:
        check_reach(shapes, step.method, step.goal, step.allocator)
    except InputError as error:
        return str(error)
    return None
