"""Several methods one after the other, under one budget of bytes."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field, FiniteFloat, ValidationError
from torch import nn

from secateur.calibration.collect import Store
from secateur.data.tokens import Calibration
from secateur.evaluate.evaluator import Questions
from secateur.evaluate.verify import Testimony
from secateur.io.run_directory import MAX_BYTES, FutileError, for_good, write_whole
from secateur.io.safetensors_header import tensors
from secateur.io.schema import Record, read_object, read_record
from secateur.layers.integers import missing_library
from secateur.methods import check_served
from secateur.models.loading import skeleton
from secateur.models.model import Model, Settings
from secateur.models.offload import published_name
from secateur.pipeline.compress import judge_result, make_report, show_record, write, write_record
from secateur.pipeline.prepare import check_reach, prepare
from secateur.pipeline.run_inputs import Task
from secateur.pipeline.runtime_checks import check_runtime
from secateur.pipeline.workers import ALONE, Crew
from secateur.planning.plan import Budget, Plan, read_plan
from secateur.planning.recipe import Recipe, Step
from secateur.report.report import Report
from secateur.report.run_records import Observed
from secateur.structure.costs import counted
from secateur.utils.errors import InputError
from secateur.utils.progress import Progress
from secateur.utils.stopwatch import Stopwatch

ATTEMPTS = 4
PLAN, OBSERVED, UNFINISHED, ATTEMPT = "plan.json", "observed.json", "unfinished", "attempt.json"


class Attempt(Record):
    """What the finished steps were made with.

    Attributes:
        number: of those before it, none of which met the budget.
        later: see :class:`_Bytes`.
    """

    number: int = Field(ge=1, lt=ATTEMPTS)
    later: FiniteFloat = Field(gt=0)


def compress_in_steps(
    source: str | Path,
    out: str | Path,
    recipe: Recipe,
    calibration: Calibration | None = None,
    questions: Questions | None = None,
    settings: Settings | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    shared: Path | None = None,
    crew: Crew = ALONE,
) -> Report:
    """Apply the steps of a recipe, each to what the one before has written, under one budget.

    Statistics are taken anew before each step. The budget is a share of the bytes that all blocks
    take on disk. The result is reloaded in a fresh process and compared before ``out`` appears. A
    run that was killed goes on behind its last finished step. ``shared`` is as for
    :func:`~secateur.pipeline.compress.compress`. Don't use it for a single method:
    :func:`~secateur.pipeline.compress.compress` has all of its options.

    Raises:
        InputError: anything wrong with the input, or a budget that no keep of the open step meets.
        RunError: the reloaded checkpoint differs from the model in memory.
    """
    settings, progress = settings or Settings(), progress or Progress()
    task = Task.of(source, out, calibration, questions, settings, progress, overwrite, shared)
    shapes = skeleton(task.source, settings)
    missing = missing_library() if recipe.steps[-1].method.final else None
    if missing is not None:  # no need to find that out behind the other steps
        raise InputError(f"recipe: {recipe.steps[-1].method.name}: {missing}.")
    budget = _Bytes.of(shapes, recipe)
    if recipe.open is not None:
        step = recipe.steps[recipe.open]
        check_served(step.method, shapes)
        if recipe.open == 0:
            check_reach(
                shapes,
                step.with_keep(budget.share(shapes, budget.dense)),
                step.goal,
                step.allocator,
            )
    workspace = task.workspace
    inputs = task.fingerprint(keep=recipe.keep, steps=[step.as_dict() for step in recipe.steps])
    watch = Stopwatch()
    with workspace.opened(inputs):
        with watch.measure("evaluate"):
            dense = task.judge_dense()
        attempt = _attempt(workspace.folder, recipe)
        if attempt is not None:
            budget = replace(budget, later=attempt.later)
        for number in range(0 if attempt is None else attempt.number, ATTEMPTS):
            plans, observed, said = _run(task, recipe, budget, watch, crew)
            reached = stored_bytes(workspace.result, shapes)
            if recipe.keep is None or reached <= recipe.keep * budget.dense:
                break
            if recipe.open is None:
                raise FutileError(
                    f"recipe: the keeps of its steps leave {reached / budget.dense:.3f} of the "
                    f"bytes, more than {recipe.keep}; leave one of them out."
                )
            # What later steps leave of narrowed shapes is known only when they are done.
            progress.say("a little above the budget: narrowing further")
            budget = replace(budget, later=budget.later * reached / (recipe.keep * budget.dense))
            if number + 1 < ATTEMPTS:
                _forget(workspace.folder, recipe, recipe.open + 1)
                now = Attempt(number=number + 1, later=budget.later)  # only when no step is left
                write_whole(workspace.folder / ATTEMPT, now.model_dump_json())
        else:
            raise FutileError(
                f"keep {recipe.keep}: the steps leave {reached / budget.dense:.3f} of the bytes. "
                f"Ask for more, or for less in the steps that have a keep."
            )
        small = judge_result(task, watch, said)
        spent = Budget(
            keep=recipe.keep or 0.0,
            of="bytes",
            total=budget.dense,
            reached=reached / budget.dense,
            batch=1,
            length=task.tokens.length,
        )
        report = make_report(task, plans, observed, spent, dense, small, watch)
        write_record(task, report, plans, recipe)
        workspace.publish()
    show_record(task)
    return report


def _run(
    task: Task, recipe: Recipe, budget: "_Bytes", watch: Stopwatch, crew: Crew
) -> tuple[list[Plan], list[dict[str, Any]], Testimony]:
    """Every step that is not finished; the last one's result is the run's."""
    source, plans, workspace = task.source, [], task.workspace
    observed: list[dict[str, Any]] = []
    for number, step in enumerate(recipe.steps, 1):
        last = number == len(recipe.steps)
        folder = workspace.result if last else workspace.folder / f"step-{number}"
        if not last and folder.exists():
            found = _finished(folder, task.settings)
            if found is not None:
                plans.append(found[0])
                observed.append(found[1])
                source = str(folder)
                continue
            _forget(workspace.folder, recipe, number)
        shapes = skeleton(source, task.settings)
        there = budget.dense if number == 1 else stored_bytes(Path(source), shapes)
        with for_good():
            check_served(step.method, shapes)
            check_runtime(shapes, step.method, step.goal)
            opens = number - 1 == recipe.open
            keep = budget.share(shapes, there) if opens else step.keep or 0.0
        task.progress.say(f"step {number} of {len(recipe.steps)}: {step.method.name}")
        prepared = prepare(
            source,
            step.with_keep(keep),
            task.calibration,
            task.tokens,
            task.settings,
            step.goal,
            step.allocator,
            Store(workspace.folder / f"statistics-{number}"),
            None,
            watch,
            task.progress,
            crew=crew,
        )
        made = folder if last else workspace.folder / UNFINISHED
        shutil.rmtree(made, ignore_errors=True)
        said = write(prepared, made, watch, task.progress)
        plans.append(prepared.plan)
        observed.append(prepared.observed)
        del prepared
        if not last:
            (made / PLAN).write_text(plans[-1].to_json())
            (made / OBSERVED).write_text(json.dumps(observed[-1]))
            made.rename(folder)
            source = str(folder)
    return plans, observed, said


def _attempt(folder: Path, recipe: Recipe) -> Attempt | None:
    """What the finished steps of an earlier run were made with, if not in the first attempt."""
    path = folder / ATTEMPT
    if not path.exists():
        return None
    try:
        return read_record(Attempt, path, "journal", MAX_BYTES)
    except InputError:  # damaged: nothing says what they are
        _forget(folder, recipe, (recipe.open or 0) + 1)
        path.unlink()
        return None


def _finished(folder: Path, settings: Settings) -> tuple[Plan, dict[str, Any]] | None:
    """Plan and observations of a step that is done; None where it is damaged."""
    try:
        observed = read_object(folder / OBSERVED, "journal", MAX_BYTES)
        Observed.model_validate(observed)
        skeleton(str(folder), settings)
        tensors(folder)
        return read_plan(folder / PLAN), observed
    except (InputError, ValidationError):
        return None


def _forget(folder: Path, recipe: Recipe, first: int) -> None:
    """Let a step and those behind it be done again."""
    for number in range(len(recipe.steps), first - 1, -1):  # last first: none outlives its source
        step = folder / f"step-{number}"
        if step.exists():
            shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
            step.rename(folder / UNFINISHED)  # at once: half of it would pass for a finished one
        if number > first:
            shutil.rmtree(folder / f"statistics-{number}", ignore_errors=True)


@dataclass(frozen=True)
class _Bytes:
    """A budget of bytes on disk for all blocks.

    Attributes:
        dense: of the dense model.
        keep: share of that which stays; 1 where the steps say by themselves.
        later: what the steps behind the open one leave of what they find.
        open: the step that this budget decides.
    """

    dense: int
    keep: float
    later: float
    open: Step | None

    @classmethod
    def of(cls, shapes: Model, recipe: Recipe) -> "_Bytes":
        dense = sum(_own(block.module) for block in shapes.blocks) * shapes.stored.itemsize
        later, step = 1.0, None
        if recipe.open is not None:
            step = recipe.steps[recipe.open]
            for behind in recipe.steps[recipe.open + 1 :]:
                later *= behind.keep or _least(behind, shapes)
        return cls(dense, recipe.keep or 1.0, later, step)

    def share(self, model: Model, there: int) -> float:
        """The keep at which the open step leaves its part of the budget.

        ``there`` is what the blocks take on disk before it.

        Raises:
            InputError: it is above 1, so the step would have nothing to do, or nothing is left.
        """
        assert self.open is not None
        itemsize = model.stored.itemsize
        units = self.open.goal.units(self.open.method, model)
        moving = sum(unit.cost(unit.size, itemsize).bytes for unit in units)
        found = (self.keep * self.dense / self.later - (there - moving)) / moving
        if found > 1:
            raise InputError(
                f"recipe: the other steps leave {self.later:.3f} of the bytes, less than the "
                f"{self.keep:.3f} asked for, and {self.open.method.name} has nothing to do. Ask "
                f"for less, or leave that step out."
            )
        if found <= 0:
            raise InputError(
                f"recipe: keep {self.keep:.3f} is out of reach: what no step changes takes more."
            )
        return found


def _own(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _least(step: Step, shapes: Model) -> float:
    """The least share that a step can leave of the dense shapes."""
    units = step.goal.units(step.method, shapes)
    prices = counted(units, "bytes", shapes.stored.itemsize)
    return prices.spent(units, step.allocator.least(units, prices)) / prices.whole(units)


def stored_bytes(folder: Path, shapes: Model) -> int:
    """What the tensors of all blocks take in the files of a checkpoint."""
    inside = _block_prefixes(shapes)
    return sum(
        entry.end - entry.start
        for name, entry in tensors(folder).items()
        if name.startswith(inside)
    )


def _block_prefixes(shapes: Model) -> tuple[str, ...]:
    """How names of tensors in blocks begin, in memory and in plain checkpoints (ViT's differ)."""
    assert shapes.anatomy is not None
    rename, found = published_name(shapes.module), set()
    for stack in shapes.anatomy.stacks:
        own = f"{shapes.prefix}{stack.blocks}."
        first = ((n, t) for n, t in shapes.module.state_dict().items() if n.startswith(own))
        found |= {own, rename(*next(first)).partition("0.")[0]}
    return tuple(sorted(found))
