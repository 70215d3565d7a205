"""Several stages one after the other, under one budget of bytes."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import Field, FiniteFloat, ValidationError
from torch import nn

from secateur.distributed.collectives import ALONE
from secateur.evaluate.measurements import Measurements
from secateur.io.run_directory import MAX_BYTES, FutileError, for_good, write_whole
from secateur.io.safetensors_header import tensors
from secateur.io.schema import Record, read_object, read_record
from secateur.layers.integers import missing_library
from secateur.methods import check_served
from secateur.methods.step import Step
from secateur.models.loading import skeleton
from secateur.models.model import Model, Settings, fingerprint
from secateur.models.offload import published_name
from secateur.models.streamed_loading import open_fitting
from secateur.pipeline.compress_stage import CompressStage
from secateur.pipeline.config import RunConfig
from secateur.pipeline.context import RunContext
from secateur.pipeline.prepare import check_reach
from secateur.pipeline.run_inputs import RunInputs
from secateur.pipeline.run_record import (
    judge_dense,
    judge_result,
    make_report,
    plans_of,
    published,
    write_record,
)
from secateur.pipeline.runtime_checks import check_runtime
from secateur.planning.plan import Base, BudgetRecord, read_plan, write_plan
from secateur.planning.recipe import Recipe, is_open
from secateur.planning.stage import Stage, StageResult
from secateur.report.report import Report
from secateur.report.run_records import Observed
from secateur.structure.costs import counted
from secateur.utils.errors import InputError
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


def run_recipe(config: RunConfig, context: RunContext) -> Report:
    """Apply the steps of a recipe, each to what the one before has written, under one budget.

    Statistics are taken anew before each step. The budget is a share of the bytes that all blocks
    take on disk. The result is reloaded in a fresh process and compared before ``out`` appears. A
    run that was killed goes on behind its last finished step.

    Raises:
        InputError: anything wrong with the input, or a budget that no keep of the open step meets.
        RunError: the reloaded checkpoint differs from the model in memory.
    """
    recipe, inputs = config.recipe, RunInputs.of(config, context)
    shapes = skeleton(inputs.source, inputs.settings)
    budget = _reachable(recipe, shapes)
    asked = inputs.fingerprint(keep=recipe.keep, steps=[step.as_dict() for step in recipe.steps])
    context = replace(context, watch=Stopwatch(), directory=inputs.workspace)

    def work() -> Report | None:
        dense = judge_dense(inputs, context)
        steps = _Steps(recipe, inputs, context)
        results = steps.within(budget, shapes)
        if dense is None:
            return None
        small = judge_result(inputs, context, results[-1].said)
        report = steps.report(results, budget, shapes, sides=(dense, small))
        write_record(inputs, report, results, recipe)
        return report

    return published(inputs, context, asked, work)


def _reachable(recipe: Recipe, shapes: Model) -> "_Bytes":
    """The recipe's budget, as far as shapes tell that it can be met.

    Raises:
        InputError: they tell that it can't, or a step needs a library that is not there.
    """
    last = recipe.steps[-1]
    if isinstance(last, Step) and last.method.final and (missing := missing_library()) is not None:
        # no need to find that out behind the other steps
        raise InputError(f"recipe: {last.method.name}: {missing}.")
    budget = _Bytes.of(shapes, recipe)
    if budget.open is not None:
        check_served(budget.open.method, shapes)
        if recipe.open == 0:
            check_reach(shapes, budget.opened(shapes, budget.dense))
    return budget


@dataclass(frozen=True)
class _Steps:
    """The steps of one run."""

    recipe: Recipe
    inputs: RunInputs
    context: RunContext

    def within(self, budget: "_Bytes", shapes: Model) -> list[StageResult]:
        """What the steps come to once they meet the budget.

        Raises:
            FutileError: they never do.
        """
        recipe, folder, say = self.recipe, self.inputs.workspace.folder, self.context.progress.say
        ranks = self.context.ranks
        first, later = ranks.broadcast(lambda: _attempt(folder, recipe, budget.later))
        budget = replace(budget, later=later)
        for number in range(first, ATTEMPTS):
            results = self.all(budget)
            reached = ranks.broadcast(lambda: stored_bytes(self.inputs.workspace.result, shapes))
            if recipe.keep is None or reached <= recipe.keep * budget.dense:
                return results
            if recipe.open is None:
                raise FutileError(
                    f"recipe: the keeps of its steps leave {reached / budget.dense:.3f} of the "
                    f"bytes, more than {recipe.keep}; leave one of them out."
                )
            # What later steps leave of narrowed shapes is known only when they are done.
            say("a little above the budget: narrowing further")
            budget = replace(budget, later=budget.later * reached / (recipe.keep * budget.dense))
            if number + 1 < ATTEMPTS and ranks.leader:
                _forget(folder, recipe, recipe.open + 1)
                now = Attempt(number=number + 1, later=budget.later)  # only when no step is left
                write_whole(folder / ATTEMPT, now.model_dump_json())
        raise FutileError(
            f"keep {recipe.keep}: the steps leave {reached / budget.dense:.3f} of the bytes. "
            f"Ask for more, or for less in the steps that have a keep."
        )

    def all(self, budget: "_Bytes") -> list[StageResult]:
        """Every step that is not finished; the last one's result is the run's."""
        workspace, source, ranks = self.inputs.workspace, self.inputs.source, self.context.ranks
        results: list[StageResult] = []
        for number, step in enumerate(self.recipe.steps, 1):
            last = number == len(self.recipe.steps)
            folder = workspace.result if last else workspace.folder / f"step-{number}"
            if not last:
                found = self.finished(number, folder, step) if ranks.leader else None
                if ranks.agree(found is not None):
                    results.append(found or StageResult())
                    source = str(folder)
                    continue
            made = folder if last else workspace.folder / UNFINISHED
            stage = self.stage(number, source, budget)
            self.context.progress.say(f"step {number} of {len(self.recipe.steps)}: {stage.name}")
            if ranks.leader:
                shutil.rmtree(made, ignore_errors=True)
            results.append(self._run(stage, source, made))
            if not last:
                if ranks.leader:
                    _keep(made, results[-1])
                    made.rename(folder)
                source = str(folder)
            ranks.barrier()  # before another rank reads it
        return results

    def _run(self, stage: Stage, source: str, out: Path) -> StageResult:
        """All ranks compress; any other stage is the leader's alone."""
        if isinstance(stage, CompressStage):
            return stage.run(source, out, self.context)
        if not self.context.ranks.leader:
            return StageResult()
        return stage.run(source, out, replace(self.context, ranks=ALONE))

    def finished(self, number: int, folder: Path, step: Step | Stage) -> StageResult | None:
        """What a step has come to in an earlier run; None where it has to be done."""
        if not folder.exists():
            return None
        found = _finished(folder, self.inputs.settings, isinstance(step, Step))
        if found is None:
            _forget(self.inputs.workspace.folder, self.recipe, number)
        return found

    def stage(self, number: int, source: str, budget: "_Bytes") -> Stage:
        """The step of a number as a stage that works on ``source``.

        Raises:
            FutileError: its method is no use for that, or the budget is out of its reach.
        """
        step = self.recipe.steps[number - 1]
        if not isinstance(step, Step):
            return step
        shapes = skeleton(source, self.inputs.settings)
        there = budget.dense if number == 1 else stored_bytes(Path(source), shapes)
        with for_good():
            check_served(step.method, shapes)
            check_runtime(shapes, step)
            step = budget.opened(shapes, there) if is_open(step) else step.filled
        statistics = self.inputs.workspace.folder / f"statistics-{number}"
        return CompressStage(step, self.inputs.model, statistics=statistics)

    def report(
        self,
        results: Sequence[StageResult],
        budget: "_Bytes",
        shapes: Model,
        *,
        sides: tuple[Measurements, Measurements],
    ) -> Report:
        """What the run has come to."""
        reached = stored_bytes(self.inputs.workspace.result, shapes)
        spent = BudgetRecord(
            keep=self.recipe.keep or 0.0,
            of="bytes",
            total=budget.dense,
            reached=reached / budget.dense,
            batch=1,
            length=self.inputs.model.tokens.length,
        )
        first = isinstance(self.recipe.steps[0], Step)
        base = plans_of(results)[0].base if first else _base(self.inputs)
        return make_report(self.inputs, self.context, results, spent, base=base, sides=sides)


def _base(inputs: RunInputs) -> Base:
    """The dense model, where no plan is for it."""
    model = open_fitting(inputs.source, inputs.settings, inputs.workspace.folder)
    return Base(
        source=model.source, model_type=model.config.model_type, fingerprint=fingerprint(model)
    )


def _attempt(folder: Path, recipe: Recipe, later: float) -> tuple[int, float]:
    """Number and ``later`` of the attempt that finished steps of an earlier run were made in.

    Those of the first attempt where nothing is finished.
    """
    path = folder / ATTEMPT
    if not path.exists():
        return 0, later
    try:
        found = read_record(Attempt, path, "journal", MAX_BYTES)
    except InputError:  # damaged: nothing says what they are
        _forget(folder, recipe, (recipe.open or 0) + 1)
        path.unlink()
        return 0, later
    return found.number, found.later


def _keep(folder: Path, result: StageResult) -> None:
    """Note beside the checkpoint of a step what the run's report says of it."""
    if result.plan is not None:
        write_plan(result.plan, folder / PLAN)
    (folder / OBSERVED).write_text(json.dumps(result.observed))


def _finished(folder: Path, settings: Settings, planned: bool) -> StageResult | None:
    """What a step that is done has come to; None where it is damaged."""
    try:
        observed = read_object(folder / OBSERVED, "journal", MAX_BYTES)
        Observed.model_validate(observed)
        skeleton(str(folder), settings)
        tensors(folder)
        return StageResult(read_plan(folder / PLAN) if planned else None, observed)
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
        later: float = 1.0
        step: Step | None = None
        if recipe.open is not None:
            step = recipe.open_step
            for behind in recipe.steps[recipe.open + 1 :]:
                if isinstance(behind, Step):
                    later *= _left_by(behind, shapes)
        return cls(dense, recipe.keep or 1.0, later, step)

    def opened(self, model: Model, there: int) -> Step:
        """The open step with the ``keep`` of :meth:`share`."""
        assert self.open is not None
        keep = self.share(model, there)
        return replace(self.open, budget=replace(self.open.budget, keep=keep)).filled

    def share(self, model: Model, there: int) -> float:
        """The keep at which the open step leaves its part of the budget.

        ``there`` is what the blocks take on disk before it.

        Raises:
            InputError: it is above 1, so the step would have nothing to do, or nothing is left.
        """
        assert self.open is not None
        itemsize = model.stored.itemsize
        units = self.open.units(model)
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


def _left_by(step: Step, shapes: Model) -> float:
    """The share of the bytes that a step leaves, or the least that it can leave of dense shapes."""
    keep = step.budget.keep
    if isinstance(keep, float):
        return keep
    units = step.units(shapes)
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
