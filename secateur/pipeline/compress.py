"""The main job: open, judge, calibrate, plan, apply, write, reload, judge again, report."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from jinja2 import TemplateError

from secateur.allocate.base import Allocator
from secateur.apply.block_errors import Witness, observations
from secateur.apply.block_journal import Journal
from secateur.apply.save import finish, store_block, writer_for
from secateur.calibration.collect import Store
from secateur.cli import parse as asked
from secateur.data.tokens import Calibration, Tokens
from secateur.evaluate.damage.domains import domains
from secateur.evaluate.evaluator import Questions, Verdict, judge_apart
from secateur.evaluate.significance import doubts
from secateur.evaluate.verify import Passage, Testimony, testimony
from secateur.io.run_directory import NARROWING, Workspace
from secateur.io.safetensors_writer import settle
from secateur.methods import check_served
from secateur.methods.base import Method
from secateur.models.loading import skeleton
from secateur.models.model import Model, Settings
from secateur.pipeline.finished import Finished, read_finished
from secateur.pipeline.prepare import (
    Prepared,
    check_reach,
    check_streams,
    chosen_allocator,
    prepare,
)
from secateur.pipeline.run_inputs import Task
from secateur.pipeline.runtime_checks import check_runtime
from secateur.pipeline.workers import ALONE, Crew
from secateur.planning.plan import Budget, Plan, check_sizes, match_units
from secateur.planning.recipe import Recipe, Step
from secateur.report import report as reporting
from secateur.report.html import write_page
from secateur.report.model_card import write_card
from secateur.report.report import Report
from secateur.report.run_records import read_run
from secateur.scoring.calibration_selection import cheap
from secateur.structure.budget import Goal
from secateur.structure.units import STREAM
from secateur.utils.errors import InputError
from secateur.utils.precision import check_exact
from secateur.utils.progress import Progress
from secateur.utils.stopwatch import Stopwatch

TESTIMONY_TOKENS = 24


def compress(
    source: str | Path,
    out: str | Path,
    method: Method | Plan,
    calibration: Calibration | None = None,
    questions: Questions | None = None,
    settings: Settings | None = None,
    goal: Goal | None = None,
    allocator: Allocator | None = None,
    scores: Path | None = None,
    statistics: Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    shared: Path | None = None,
    crew: Crew = ALONE,
) -> Report:
    """Make a smaller checkpoint of ``source`` in the folder ``out`` and report what it costs.

    Give a method, or a plan to apply it without searching again (a plan brings its own method,
    calibration, goal and allocator). The result is reloaded in a fresh process and compared before
    ``out`` appears. For several methods one after the other there is
    :func:`~secateur.pipeline.multi_step.compress_in_steps`.

    Args:
        source: folder or hub id of a model.
        out: folder that must not exist, unless ``overwrite``.
        method: for example ``Auto(keep=0.8)``.
        calibration: the text that decides; by default the bundled one.
        questions: what to measure; by default perplexity on two texts that calibration never
            sees, speed and a sample.
        settings: device and number format.
        goal: what the budget counts, and constraints on sizes.
        allocator: what spends the budget; by default the method's own.
        scores: file to read the units' scores from, or to write them to if there is none; by
            default the user's cache.
        statistics: folder to keep the calibration's statistics in, or to find them in; by default
            they last as long as the run.
        overwrite: replace ``out`` once the new result is whole.
        progress: who is told how far it is.
        shared: folder beside ``out`` in which runs that ask the same keep what is measured of the
            dense model; by default every run measures it.
        crew: processes that share the work, by default this one.

    Raises:
        InputError: anything wrong with the input; nothing is left behind.
        RunError: the reloaded checkpoint differs from the model in memory.
    """
    settings, progress = settings or Settings(), progress or Progress()
    if isinstance(method, Plan):
        plan, method = method, method.build_method()
        if goal is not None or allocator is not None:
            raise InputError("a plan brings its own goal and allocator; give one or the other.")
        goal, allocator = plan.goal, plan.build_allocator()
        own = plan.calibration.choice()
        if calibration not in (None, own):
            raise InputError("a plan brings its own calibration; give one or the other.")
        calibration = own
    else:
        plan, goal = None, goal or Goal(method.target)
        allocator = chosen_allocator(method, goal, allocator)
    task = Task.of(source, out, calibration, questions, settings, progress, overwrite, shared)
    shapes = skeleton(task.source, settings)
    if plan is None:
        check_reach(shapes, method, goal, allocator)
        if task.calibration.select == "kl":
            cheap(shapes, method, goal, allocator)
    else:
        check_runtime(shapes, method, goal)
        match_units(plan, shapes, method)
        check_served(method, shapes)
    if settings.stream == "on":
        check_streams(method, goal, allocator)
    if goal.target == "latency":
        check_exact(settings.torch_device(), "--target latency")
    inputs = task.fingerprint(
        method={"name": method.name, **asdict(method)},
        plan=None if plan is None else plan.sizes,
        goal=asdict(goal),
        allocator={"name": allocator.name, **asdict(allocator)},
    )
    workspace = task.workspace
    watch = Stopwatch()
    with workspace.opened(inputs):
        with watch.measure("evaluate"):
            dense = task.judge_dense()
        finished = read_finished(workspace.folder)
        if finished is None:
            prepared = prepare(
                task.source,
                plan or method,
                task.calibration,
                task.tokens,
                settings,
                goal,
                allocator,
                Store(statistics or workspace.folder / "statistics"),
                scores,
                watch,
                progress,
                stage=workspace.stage,
                crew=crew,
            )
            journal = workspace.folder / NARROWING
            said = write(prepared, workspace.result, watch, progress, journal)
            finished = Finished(prepared.plan, prepared.observed, watch.seconds, said)
            finished.keep(workspace.folder)
            del prepared  # the measuring process needs the memory
        settle(workspace.result)
        plan, observed, said = finished.plan, finished.observed, finished.said
        watch.seconds = {**finished.seconds, **watch.seconds}
        small = judge_result(task, watch, said)
        report = make_report(task, [plan], [observed], plan.budget, dense, small, watch)
        step = Step(method, goal, allocator, method.keep or None)
        write_record(task, report, [plan], Recipe((step,)))
        workspace.publish()
    show_record(task)
    return report


def write(
    prepared: Prepared,
    folder: Path,
    watch: Stopwatch,
    progress: Progress,
    kept: Path | None = None,
) -> Testimony:
    """Narrow the model block by block into a checkpoint, and take its testimony.

    Leaves the model in ``prepared`` narrowed and, from the testimony, in bfloat16, and there what
    was observed. In ``kept`` it is noted after each block how far that is, so that it goes on from
    there when it is called again.
    """
    model, plan = prepared.model, prepared.plan
    writer = writer_for(model, plan.tier, folder)
    journal = None
    if kept is not None and prepared.method.kinds != STREAM:
        journal = Journal(
            kept, writer, plan.sizes, model.residence is not None, prepared.crew.ranks
        )
    first = model.use.beginning(prepared.tokens, TESTIMONY_TOKENS)
    passage = None if model.residence is None else Passage(model, first)
    method = prepared.method
    units = plan.goal.units(method, model)
    evidence, blocks = prepared.evidence, len(model.blocks)
    witness = None
    if evidence is not None and method.kinds != STREAM:
        witness = Witness(model, prepared.tokens)
    if journal is not None:
        if witness is not None:
            witness.errors = journal.errors  # one list
            journal.attach("witness", witness.line)
        if passage is not None:
            journal.attach("passage", passage.line)
    given = (model, method, units, plan.sizes, prepared.tokens, prepared.store)
    narrowed = prepared.crew.narrow_blocks(*given, journal)
    with progress.stage("narrowing and writing", len(model.blocks)) as advance:
        advance(journal.done if journal is not None else 0)
        while True:
            with watch.measure("apply"):
                block = next(narrowed, None)
            if block is None:
                break
            with watch.measure("save"):
                store_block(model, block, writer)
            with watch.measure("evaluate"):
                for follower in (witness, passage):
                    if follower is not None:
                        follower.follow(block)
            if journal is not None:
                with watch.measure("save"):
                    journal.record(block)
            if model.residence is not None:
                model.residence.leave(block)
            advance(1)
    with watch.measure("evaluate"):
        said = None if passage is None else passage.testimony()
        if evidence is not None:
            errors = [] if witness is None else witness.errors
            prepared.observed = observations(units, blocks, prepared.store, evidence, errors)
    with watch.measure("save"):
        finish(model, plan.tier, writer, settle=journal is None)
    with watch.measure("evaluate"):
        return Testimony(testimony(model, first) if said is None else said, first)


def judge_result(task: Task, watch: Stopwatch, said: Testimony) -> Verdict:
    """What a fresh process measures of the result, which must say what memory said."""
    with watch.measure("evaluate"):
        task.progress.say("reloading in a fresh process")
        settings = replace(task.settings, stream="on" if said.streamed else "off")
        given = (str(task.workspace.result), task.questions, settings, task.progress)
        return judge_apart(*given, said, task.outputs, task.workspace.folder)


def make_report(
    task: Task,
    plans: Sequence[Plan],
    observed: Sequence[dict[str, Any]],
    budget: Budget,
    dense: Verdict,
    small: Verdict,
    watch: Stopwatch,
) -> Report:
    """What a run of one or several plans has come to."""
    seconds = dict.fromkeys(("calibrate", "curves", "allocate", "apply", "save", "evaluate"), 0.0)
    plan = plans[-1]
    content = {
        "version": reporting.VERSION,
        "command": asked.COMMAND.get(),
        "model": plans[0].base.model_dump(),
        "method": plan.method.model_dump(),
        "allocator": plan.allocator.model_dump(),
        "budget": budget.model_dump(),
        "tier": plan.tier,
        "densified": sum(p.densified for p in plans),
        "libraries": sorted({name for p in plans for name in p.libraries}),
        "dense": asdict(dense),
        "dense_shared": task.shared is not None,
        "compressed": asdict(small),
        "domains": domains(dense.perplexity, small.perplexity),
        "doubts": doubts(
            {"dense": dense.task_scores, "compressed": small.task_scores}, small.task_changes
        ),
        "seconds": seconds | watch.finish(),
        "versions": reporting.versions(),
        "seed": task.calibration.seed,
        "calibration": plan.calibration.model_dump(),
        "observed": [*observed],
    }
    if len(plans) > 1:
        content["method"] = {"name": " + ".join(p.method.name for p in plans), "options": {}}
        keys = ("method", "allocator", "budget")
        content["steps"] = [{k: getattr(p, k).model_dump() for k in keys} for p in plans]
    return Report(content)


def write_record(task: Task, report: Report, plans: Sequence[Plan], recipe: Recipe) -> None:
    """Put beside the weights what was asked for, what was decided and what came of it."""
    record = task.workspace.result / "secateur"
    record.mkdir(exist_ok=True)
    for number, plan in enumerate(plans, 1):
        name = "plan.json" if len(plans) == 1 else f"plan-{number}.json"
        (record / name).write_text(plan.to_json())
    report.write(record / "report.json")
    asked = recorded(
        task.source, recipe, plans[0].calibration.choice(), task.questions, task.settings
    )
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
    content = {
        "version": 3,
        "model": source,
        "keep": recipe.keep,
        "steps": [step.as_dict() for step in recipe.steps],
        "calibration": chosen,
        "evaluate": asdict(questions) | {"texts": [asdict(text) for text in questions.texts]},
        "settings": asdict(settings),
    }
    return yaml.safe_dump(content, sort_keys=False)


def show_record(task: Task) -> None:
    """Write page and card from the record of a published run, which is whole without them."""
    try:
        write_page(task.workspace.out)
        write_card(read_run(task.workspace.out))
    except (InputError, OSError, TemplateError, ArithmeticError) as error:
        task.progress.say(
            f"note: the report page was not written ({error}); `secateur report "
            f"{shlex.quote(str(task.workspace.out))}` tries again"
        )


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
    check_sizes(plan, model, method)
    check_served(method, model)
    prepared = Prepared(model, tokens, store, method, plan)
    workspace, progress = Workspace(Path(out), overwrite), Progress()
    settings = Settings(
        device=str(model.device), dtype=str(model.module.dtype).removeprefix("torch.")
    )
    with workspace.opened({"plan": plan.model_dump(mode="json")}):
        said = write(prepared, workspace.result, Stopwatch(), progress)
        judge_apart(str(workspace.result), Questions((), speed=False), settings, progress, said)
        (workspace.result / "secateur").mkdir()
        (workspace.result / "secateur" / "plan.json").write_text(plan.to_json())
        workspace.publish()
