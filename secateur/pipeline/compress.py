"""The main job: check, measure, calibrate, plan, apply, write, reload, measure again, report."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from secateur.calibration.collect import Store
from secateur.data.tokens import Tokens
from secateur.evaluate.evaluator import measure_in_subprocess
from secateur.evaluate.measurements import Questions
from secateur.io.run_directory import Workspace
from secateur.io.safetensors_writer import settle
from secateur.methods import check_served
from secateur.methods.base import Method
from secateur.methods.step import Step
from secateur.models.loading import skeleton
from secateur.models.model import Model, Settings
from secateur.pipeline.compress_stage import CompressStage, write
from secateur.pipeline.config import RunConfig
from secateur.pipeline.context import RunContext
from secateur.pipeline.finished import Finished, read_finished
from secateur.pipeline.multi_step import run_recipe
from secateur.pipeline.prepare import Prepared, check_reach, check_streams
from secateur.pipeline.run_inputs import RunInputs
from secateur.pipeline.run_record import (
    judge_dense,
    judge_result,
    make_report,
    published,
    write_record,
)
from secateur.pipeline.runtime_checks import check_runtime
from secateur.planning.checks import check_sizes, match_units
from secateur.planning.plan import Plan, write_plan
from secateur.planning.recipe import Recipe
from secateur.planning.stage import StageResult
from secateur.report.report import Report
from secateur.scoring.calibration_selection import cheap
from secateur.structure.budget import Budget
from secateur.utils.precision import check_exact
from secateur.utils.stopwatch import Stopwatch


def compress(
    source: str | Path,
    out: str | Path,
    method: Method | Plan | Recipe,
    budget: Budget | None = None,
    *,
    context: RunContext | None = None,
    **options: Any,
) -> Report:
    """Compress the model ``source`` into a checkpoint in the folder ``out``, and report the cost.

    Give a method, for example ``compress("demo", "small", Auto(), Budget(keep=0.8))``; or a plan,
    to apply it without searching again; or a recipe, to apply several methods one after the other.
    The result is reloaded in a fresh process and compared with the model in memory before ``out``
    appears. A run that was killed goes on when it is called again.

    Args:
        source: folder or hub id of a model.
        out: folder that must not exist, unless ``overwrite``.
        method: a method, a plan or a recipe.
        budget: how much stays, and what that counts; by default the method's usual.
        context: who is told how far the run is, and who shares the work; by default nobody.
        options: the other fields of :class:`~secateur.pipeline.config.RunConfig`: ``allocator``,
            ``calibration``, ``questions``, ``settings``, ``scores``, ``statistics``,
            ``overwrite``.

    Raises:
        InputError: anything wrong with the input; nothing is left behind.
        RunError: the reloaded checkpoint differs from the model in memory.
    """
    return run(RunConfig(source, out, method, budget, **options), context)


def run(config: RunConfig, context: RunContext | None = None) -> Report:
    """Do what a config asks for; see :func:`compress`."""
    context = context or RunContext()
    if isinstance(config.method, Recipe):
        return run_recipe(config, context)
    step = config.step
    inputs = RunInputs.of(config, context)
    _check(config, step, skeleton(inputs.source, inputs.settings))
    asked = inputs.fingerprint(
        method={"name": step.method.name, **asdict(step.method)},
        plan=None if config.plan is None else config.plan.sizes,
        selection=None if config.plan is None else config.plan.selection,
        budget=step.budget.as_dict(),
        allocator={"name": step.allocator.name, **asdict(step.allocator)},
    )
    context = replace(context, watch=Stopwatch(), directory=inputs.workspace)

    def work() -> Report | None:
        dense = judge_dense(inputs, context)
        result = _compressed(config, step, inputs, context)
        if dense is None or result.plan is None:
            return None
        settle(inputs.workspace.result)
        small = judge_result(inputs, context, result.said)
        budget, base = result.plan.budget, result.plan.base
        report = make_report(inputs, context, [result], budget, base=base, sides=(dense, small))
        write_record(inputs, report, [result], Recipe((step,)))
        return report

    return published(inputs, context, asked, work)


def _check(config: RunConfig, step: Step, shapes: Model) -> None:
    """Refuse what can be told from shapes, before anything is measured.

    Raises:
        InputError: the method, the plan or the budget does not suit the model or the device.
    """
    if config.plan is None:
        check_reach(shapes, step)
        if config.calibration is not None and config.calibration.select == "kl":
            cheap(shapes, step)
    else:
        check_runtime(shapes, step)
        match_units(config.plan, shapes, step.method)
        check_served(step.method, shapes)
    if config.settings.stream == "on":
        check_streams(step)
    if step.budget.target == "latency":
        check_exact(config.settings.torch_device(), "--target latency")


def _compressed(
    config: RunConfig, step: Step, inputs: RunInputs, context: RunContext
) -> StageResult:
    """The compressed checkpoint, written now or by a run that was killed behind that."""
    workspace, watch, ranks = inputs.workspace, context.watch, context.ranks
    finished = read_finished(workspace.folder) if ranks.leader else None
    if ranks.agree(finished is None):
        stage = CompressStage(
            step,
            inputs.model,
            statistics=config.statistics or workspace.folder / "statistics",
            scores=config.scores,
            plan=config.plan,
            resumes=True,
        )
        made = stage.run(inputs.source, workspace.result, context)
        if made.plan is not None and made.said is not None:  # where this rank leads
            finished = Finished(made.plan, made.observed, watch.seconds, made.said)
            finished.keep(workspace.folder)
    if finished is None:
        return StageResult()
    watch.seconds = {**finished.seconds, **watch.seconds}
    return StageResult(finished.plan, finished.observed, finished.said)


def save(
    model: Model,
    out: str | Path,
    plan: Plan,
    store: Store,
    tokens: Tokens,
    overwrite: bool = False,
    method: Method | None = None,
) -> None:
    """Apply a plan to an open model and write the checkpoint; the end of the long form.

    ``model`` is narrowed in place and left in bfloat16. ``tokens`` are those that filled
    ``store``, ``method`` is the plan's, to be given where it is none of this package's. The
    checkpoint is reloaded in a fresh process and compared before ``out`` appears.

    Raises:
        InputError: the plan does not fit the model, or ``out`` exists.
        RunError: the reloaded checkpoint differs from the model in memory.
    """
    method = method or plan.build_method()
    units = check_sizes(plan, model, method)
    check_served(method, model)
    step = Step(method, plan.asked_budget, method.allocator)
    prepared = Prepared(model, tokens, store, step, plan, units=units)
    workspace, context = Workspace(Path(out), overwrite), RunContext()
    settings = Settings(
        device=str(model.device), dtype=str(model.module.dtype).removeprefix("torch.")
    )
    with workspace.opened({"plan": plan.model_dump(mode="json")}):
        said = write(prepared, workspace.result, context)
        nothing = Questions((), speed=False)
        measure_in_subprocess(str(workspace.result), nothing, settings, context.progress, said)
        (workspace.result / "secateur").mkdir()
        write_plan(prepared.plan, workspace.result / "secateur" / "plan.json")
        workspace.publish()
