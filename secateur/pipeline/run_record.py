"""What a finished run leaves beside its weights: report, plans, recipe, page and model card."""

import shlex
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

import yaml
from jinja2 import TemplateError

from secateur.data.tokens import Calibration
from secateur.evaluate.damage.domains import domains
from secateur.evaluate.evaluator import measure_in_subprocess
from secateur.evaluate.measurements import Measurements, Questions
from secateur.evaluate.significance import doubts
from secateur.evaluate.verify import ReferenceOutputs
from secateur.models.model import Settings
from secateur.pipeline.context import RunContext
from secateur.pipeline.run_inputs import RunInputs
from secateur.planning.plan import Base, BudgetRecord, Plan, write_plan
from secateur.planning.recipe import Recipe
from secateur.planning.stage import StageResult
from secateur.report.html import write_page
from secateur.report.model_card import write_card
from secateur.report.report import VERSION, Report
from secateur.report.run_records import read_run
from secateur.utils.errors import InputError
from secateur.utils.run_info import versions

PARTS = ("calibrate", "curves", "allocate", "apply", "save", "evaluate")


def published(
    inputs: RunInputs,
    context: RunContext,
    asked: dict[str, Any],
    work: Callable[[], Report | None],
) -> Report:
    """Take the run's folder, do its ``work``, let the result appear, and give all ranks its report.

    All ranks do the work. The leader alone has the folder, and alone has a report of the work.

    Raises:
        InputError: the folder can't be taken; see :meth:`Workspace.opened`.
    """
    ranks, report = context.ranks, None
    with inputs.workspace.opened(asked) if ranks.leader else nullcontext():
        report = work()
        if report is not None:
            inputs.workspace.publish()
    if report is not None:
        show_record(inputs, context)
    return Report(ranks.broadcast(lambda: report.content if report is not None else {}))


def judge_dense(inputs: RunInputs, context: RunContext) -> Measurements | None:
    """What the leader measures of the dense model."""
    with context.watch.measure("evaluate"):
        return inputs.judge_dense() if context.ranks.leader else None


def judge_result(
    inputs: RunInputs, context: RunContext, said: ReferenceOutputs | None
) -> Measurements:
    """What a fresh process measures of the result, which must say what memory said."""
    streamed = said is not None and said.streamed
    with context.watch.measure("evaluate"):
        context.progress.say("reloading in a fresh process")
        settings = replace(inputs.settings, stream="on" if streamed else "off")
        return measure_in_subprocess(
            str(inputs.workspace.result),
            inputs.questions,
            settings,
            context.progress,
            said=said,
            outputs_of_dense=inputs.outputs,
            scratch=inputs.workspace.folder,
        )


def make_report(
    inputs: RunInputs,
    context: RunContext,
    results: Sequence[StageResult],
    budget: BudgetRecord,
    *,
    base: Base,
    sides: tuple[Measurements, Measurements],
) -> Report:
    """What a run of one or several stages has come to; ``sides`` are dense and compressed."""
    plans, (dense, small) = plans_of(results), sides
    plan = plans[-1]
    content = {
        "version": VERSION,
        "command": context.command,
        "model": base.model_dump(),
        "method": plan.method.model_dump(),
        "allocator": None if plan.allocator is None else plan.allocator.model_dump(),
        "budget": budget.model_dump(),
        "tier": plan.tier,
        "densified": sum(p.densified for p in plans),
        "libraries": sorted({name for p in plans for name in p.libraries}),
        "dense": asdict(dense),
        "dense_shared": context.shared is not None,
        "compressed": asdict(small),
        "domains": domains(dense.perplexity, small.perplexity),
        "doubts": doubts(
            {"dense": dense.task_scores, "compressed": small.task_scores}, small.task_changes
        ),
        "seconds": dict.fromkeys(PARTS, 0.0) | context.watch.finish(),
        "versions": versions(),
        "seed": inputs.model.calibration.seed,
        "calibration": plan.calibration.model_dump(),
        "observed": [result.observed for result in results if result.plan is not None],
    }
    if len(plans) > 1:
        content["method"] = {"name": " + ".join(p.method.name for p in plans), "options": {}}
        keys = ("method", "allocator", "budget")
        content["steps"] = [{k: getattr(p, k).model_dump() for k in keys} for p in plans]
    return Report(content)


def plans_of(results: Sequence[StageResult]) -> list[Plan]:
    """The plans of those stages that have one."""
    return [result.plan for result in results if result.plan is not None]


def write_record(
    inputs: RunInputs, report: Report, results: Sequence[StageResult], recipe: Recipe
) -> None:
    """Put beside the weights what was asked for, what was decided and what came of it."""
    record, plans = inputs.workspace.result / "secateur", plans_of(results)
    record.mkdir(exist_ok=True)
    for number, plan in enumerate(plans, 1):
        name = "plan.json" if len(plans) == 1 else f"plan-{number}.json"
        write_plan(plan, record / name)
    report.write(record / "report.json")
    calibration = plans[0].calibration.choice()
    asked = recorded(inputs.source, recipe, calibration, inputs.questions, inputs.settings)
    (record / "recipe.yaml").write_text(asked)


def recorded(
    source: str,
    recipe: Recipe,
    calibration: Calibration,
    questions: Questions,
    settings: Settings,
) -> str:
    """The text of recipe.yaml: what was asked for, with every default."""
    chosen = {k: v for k, v in calibration.as_dict().items() if k != "windows"}
    content: dict[str, Any] = {
        "version": 3,
        "model": source,
        "keep": recipe.keep,
        "steps": [step.as_dict() for step in recipe.steps],
        "calibration": chosen,
        "evaluate": asdict(questions) | {"texts": [asdict(text) for text in questions.texts]},
        "settings": asdict(settings),
    }
    return yaml.safe_dump(content, sort_keys=False)


def show_record(inputs: RunInputs, context: RunContext) -> None:
    """Write page and card from the record of a published run, which is whole without them."""
    out = inputs.workspace.out
    try:
        write_page(out)
        write_card(read_run(out))
    except (InputError, OSError, TemplateError, ArithmeticError) as error:
        context.progress.say(
            f"note: the report page was not written ({error}); `secateur report "
            f"{shlex.quote(str(out))}` tries again"
        )
