"""The main job: open, judge, calibrate, plan, apply, write, reload, judge again, report."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from secateur import report as reporting
from secateur.allocate.base import Allocator
from secateur.allocate.plain import PlainWidth
from secateur.calibration import Store, calibrate
from secateur.checkpoint import Writer, published_name, store_block, store_rest, write_config
from secateur.depth import close_ranks
from secateur.errors import InputError
from secateur.evaluate.judge import Questions, Verdict, judge_apart
from secateur.evaluate.reload import testimony
from secateur.goal import Goal
from secateur.inputs import (
    check_out,
    default_texts,
    overlaps,
    read_calibration,
    stamps,
    text_notes,
    unseen,
)
from secateur.latency import check_length, check_timed
from secateur.methods import check_served
from secateur.methods.base import Method
from secateur.model import (
    Model,
    Settings,
    open_model,
    skeleton,
)
from secateur.plan import (
    Plan,
    check_sizes,
    make_plan,
    match_units,
    prices_of,
    revise,
    usual_allocator,
)
from secateur.prices import counted
from secateur.progress import Progress
from secateur.propagate import narrow_blocks
from secateur.report import Report
from secateur.scores import identity, keep_evidence, kept_evidence, score
from secateur.select import DRAWS, cheap, select_calibration
from secateur.stream import TOKENS_PER_BATCH
from secateur.text import (
    Calibration,
    Tokens,
    calibration_tokens,
    read_documents,
)
from secateur.units import DEPTH
from secateur.workspace import Workspace

TESTIMONY_TOKENS = 24


@dataclass
class Stopwatch:
    """Seconds by stage."""

    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Add the time spent inside to a stage."""
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def finish(self) -> dict[str, float]:
        """All stages and the total, to the millisecond."""
        self.seconds["total"] = time.perf_counter() - self.started
        return {stage: round(value, 3) for stage, value in self.seconds.items()}


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
) -> Report:
    """Make a smaller checkpoint of ``source`` in the folder ``out`` and report what it costs.

    Give a method, or a plan to apply it without searching again (a plan brings its own method,
    calibration, goal and allocator). The result is reloaded in a fresh process and compared before
    ``out`` appears. Don't use it for a model that is already compressed.

    Args:
        source: folder or hub id of a causal language model.
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
        plan, goal = None, goal or Goal()
        allocator = chosen_allocator(method, goal, allocator)
    calibration = calibration or Calibration()
    questions = questions or Questions(default_texts(calibration), length=calibration.length)
    questions = replace(questions, texts=unseen(questions.texts, calibration))
    source, out = str(source), Path(out).expanduser()
    inputs_found = [source, calibration.source, *(text.source for text in questions.texts)]
    check_out(out, inputs_found)
    tokens = read_calibration(source, calibration, settings)
    for text in questions.texts:
        read_documents(text.source)
    for note in overlaps(questions.texts, calibration):
        progress.say(f"note: {note}")
    shapes = skeleton(source, settings)
    if plan is None:
        check_reach(shapes, method, goal, allocator)
        if calibration.select == "kl":
            cheap(shapes, method, goal, allocator)
    else:
        match_units(plan, shapes, method)
    workspace = Workspace(out, overwrite)
    inputs = {
        "secateur": reporting.versions()["secateur"],
        "model": source,
        "method": {"name": method.name, **asdict(method)},
        "plan": None if plan is None else plan.sizes,
        "calibration": calibration.as_dict(),
        "questions": asdict(questions),
        "settings": asdict(settings),
        "goal": asdict(goal),
        "allocator": {"name": allocator.name, **asdict(allocator)},
        "files": stamps(inputs_found, (workspace.folder, out)),
    }
    watch = Stopwatch()
    with workspace.opened(inputs):
        with watch.measure("evaluate"):
            dense = _dense(source, questions, settings, progress, workspace)
        prepared = prepare(
            source,
            plan or method,
            calibration,
            tokens,
            settings,
            goal,
            allocator,
            Store(statistics or workspace.folder / "statistics"),
            scores,
            watch,
            progress,
        )
        memory, ids = write(prepared, workspace.result, watch, progress)
        plan = prepared.plan
        del prepared  # the measuring process needs the memory
        with watch.measure("evaluate"):
            progress.say("reloading in a fresh process")
            small = judge_apart(str(workspace.result), questions, settings, progress, memory, ids)
        report = _report(plan, dense, small, watch, calibration)
        _write_record(workspace.result, plan, goal, report, questions, settings)
        workspace.publish()
    return report


def chosen_allocator(method: Method, goal: Goal, asked: Allocator | None) -> Allocator:
    """What spends the budget: what was asked for, or what the tier demands, or the method's own.

    Raises:
        InputError: the tier leaves nothing to allocate.
    """
    shaped = goal.tier == "plain" and method.kinds != DEPTH
    if shaped and not isinstance(asked, PlainWidth | None):
        raise InputError(
            f"tier plain has one MLP width and nothing to allocate; leave out allocator "
            f"{asked.name!r}, or ask for tier per-layer."
        )
    return asked or usual_allocator(method, goal)


def check_reach(shapes: Model, method: Method, goal: Goal, allocator: Allocator) -> None:
    """Refuse a budget out of reach before any weight is read; latency has to be measured first.

    Raises:
        InputError: it is out of reach, or the method is no use for the model or the tier.
    """
    check_served(method, shapes)
    units = method.units(shapes, goal.multiple_of)
    if goal.tier == "plain" and any(u.new_bias and len(allocator.choices(u)) > 1 for u in units):
        raise InputError(
            f"tier plain: {method.name} adds biases, for which stock classes of this family have "
            "no place. Leave them out (--compensate 0), or ask for tier per-layer."
        )
    if goal.target == "latency":
        check_timed(units)
        allocator.check_units(units)
        check_length(shapes, goal)
    else:
        prices = counted(units, goal.target, shapes.stored.itemsize)
        allocator.check(units, prices, method.keep)


@dataclass
class Prepared:
    """A model with its plan and, unless it is only planned, its statistics; nothing has changed."""

    model: Model
    tokens: Tokens
    store: Store
    method: Method
    plan: Plan


def prepare(
    source: str,
    method: Method | Plan,
    calibration: Calibration,
    tokens: Tokens,
    settings: Settings,
    goal: Goal,
    allocator: Allocator,
    store: Store,
    scores: Path | None,
    watch: Stopwatch,
    progress: Progress,
    only_plan: bool = False,
) -> Prepared:
    """Open a model, calibrate it and decide the sizes, or check those of a given plan.

    Scores that were measured before are used again. ``only_plan`` then needs no calibration.

    Raises:
        InputError: anything wrong with the input.
    """
    if scores is not None and not scores.absolute().parent.is_dir():
        raise InputError(f"--scores {str(scores)!r}: there is no folder {str(scores.parent)!r}.")
    with watch.measure("open"):
        model = open_model(source, settings)
        chosen = method.build_method() if isinstance(method, Plan) else method
        for note in model.obstacles_of(chosen.kinds):
            progress.say(f"note: {note}")
        units = chosen.units(model, goal.multiple_of)
        for note in text_notes(calibration, tokens, units):
            progress.say(f"note: {note}")
    if isinstance(method, Plan):
        check_sizes(method, model, chosen)
    with watch.measure("allocate"):
        if goal.target == "latency":
            progress.say("timing the units on this machine, unless that was done before")
        prices = prices_of(model, units, goal)
        if not isinstance(method, Plan):
            allocator.check(units, prices, chosen.keep)
    if calibration.select != "none" and not calibration.windows:
        with (
            watch.measure("select"),
            progress.stage("choosing calibration text", DRAWS) as advance,
        ):
            calibration = select_calibration(model, calibration, chosen, goal, allocator, advance)
            tokens = calibration_tokens(calibration, model.tokenizer)
    if calibration.windows:
        count = len(calibration.windows)
        progress.say(f"calibrating on {count} windows chosen by {calibration.select}")
    own, every = identity(model, chosen, tokens, allocator), chosen.units(model, 1)
    needs = chosen.needs | allocator.needs
    known = ("secateur", "model", "calibration", "dtype")
    store.claim({key: own[key] for key in known}, needs)
    evidence = kept_evidence(own, every, scores)
    searches = allocator.searches and not isinstance(method, Plan)
    if evidence is None or not only_plan or searches:
        watch.seconds["calibration_forward"] = _forward_seconds(model, tokens)
        if not all(block.index in store for block in model.blocks):
            with (
                watch.measure("calibrate"),
                progress.stage("calibrating, block by block", len(model.blocks)) as advance,
            ):
                calibrate(model, tokens, needs, store, advance)
    if evidence is None:
        with watch.measure("curves"), progress.stage("scoring units", len(every)) as advance:
            evidence = score(model, chosen, store, tokens, allocator, advance)
        keep_evidence(own, evidence, scores)
    if not allocator.measured:  # whatever the cache holds, the same command gives the same plan
        evidence = replace(evidence, losses=None)
    with watch.measure("allocate"):
        if isinstance(method, Plan):
            if method.calibration.fingerprint != tokens.fingerprint:
                progress.say("note: this plan was made from other calibration tokens")
            plan = revise(method, model, chosen, evidence, prices)
        else:
            if searches:
                progress.say("searching: every candidate is judged on calibration text")
            plan = make_plan(
                model, chosen, evidence, calibration, tokens, goal, allocator, prices, store
            )
    return Prepared(model, tokens, store, chosen, plan)


def write(
    prepared: Prepared, folder: Path, watch: Stopwatch, progress: Progress
) -> tuple[dict[str, Tensor], Tensor]:
    """Narrow the model block by block into a checkpoint, and take its testimony.

    Leaves the model in ``prepared`` narrowed and, from the testimony, in bfloat16.
    """
    model, plan = prepared.model, prepared.plan
    # A plain checkpoint is for any reader, so its tensors have their published names.
    plain = plan.tier == "plain"
    writer = Writer(folder, rename=published_name(model.module)) if plain else Writer(folder)
    method = prepared.method
    units = method.units(model, plan.multiple_of)
    narrowed = narrow_blocks(model, method, units, plan.sizes, prepared.tokens, prepared.store)
    with progress.stage("narrowing and writing", len(model.blocks)) as advance:
        while True:
            with watch.measure("apply"):
                block = next(narrowed, None)
            if block is None:
                break
            with watch.measure("save"):
                store_block(model, block, writer)
            advance(1)
    with watch.measure("save"):
        store_rest(model, writer)
        writer.finish()
        close_ranks(model)
        write_config(model, plan.tier, folder)
    with watch.measure("evaluate"):
        ids = prepared.tokens.ids[0, :TESTIMONY_TOKENS].clone()
        return testimony(model.module, ids), ids


def _forward_seconds(model: Model, tokens: Tokens) -> float:
    """What a plain forward pass over the calibration tokens takes, scaled up from one batch."""
    rows = min(len(tokens.ids), max(1, TOKENS_PER_BATCH // tokens.ids.shape[1]))
    ids = tokens.ids[:rows].to(model.device)
    with torch.inference_mode():
        body = model.module.base_model  # the head takes no part in calibration
        body(input_ids=ids[:1], use_cache=False)
        start = time.perf_counter()
        float(body(input_ids=ids, use_cache=False).last_hidden_state[0, 0, 0])  # waits for a GPU
        return (time.perf_counter() - start) * len(tokens.ids) / rows


def _dense(
    source: str,
    questions: Questions,
    settings: Settings,
    progress: Progress,
    workspace: Workspace,
) -> Verdict:
    def measured() -> dict[str, Any]:
        progress.say("measuring the dense model")
        return asdict(judge_apart(source, questions, settings, progress))

    return Verdict(**workspace.stage("dense", measured))


def _report(
    plan: Plan, dense: Verdict, small: Verdict, watch: Stopwatch, calibration: Calibration
) -> Report:
    seconds = dict.fromkeys(("calibrate", "curves", "allocate", "apply", "save", "evaluate"), 0.0)
    return Report(
        {
            "version": 2,
            "model": plan.base.model_dump(),
            "method": plan.method.model_dump(),
            "allocator": plan.allocator.model_dump(),
            "budget": plan.budget.model_dump(),
            "tier": plan.tier,
            "dense": asdict(dense),
            "compressed": asdict(small),
            "seconds": seconds | watch.finish(),
            "versions": reporting.versions(),
            "seed": calibration.seed,
            "calibration": plan.calibration.model_dump(),
        }
    )


def _write_record(
    folder: Path,
    plan: Plan,
    goal: Goal,
    report: Report,
    questions: Questions,
    settings: Settings,
) -> None:
    record = folder / "secateur"
    record.mkdir()
    (record / "plan.json").write_text(plan.to_json())
    report.write(record / "report.json")
    recipe = {
        "version": 2,
        "model": plan.base.source,
        "method": plan.method.model_dump(),
        "allocator": plan.allocator.model_dump(),
        "calibration": plan.calibration.model_dump(exclude={"tokens", "fingerprint", "windows"}),
        "goal": asdict(goal),
        "evaluate": asdict(questions) | {"texts": [asdict(text) for text in questions.texts]},
        "settings": asdict(settings),
    }
    (record / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))


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
    prepared = Prepared(model, tokens, store, method, plan)
    workspace, progress = Workspace(Path(out), overwrite), Progress()
    settings = Settings(
        device=str(model.device), dtype=str(model.module.dtype).removeprefix("torch.")
    )
    with workspace.opened({"plan": plan.model_dump(mode="json")}):
        memory, ids = write(prepared, workspace.result, Stopwatch(), progress)
        judge_apart(
            str(workspace.result), Questions((), speed=False), settings, progress, memory, ids
        )
        (workspace.result / "secateur").mkdir()
        (workspace.result / "secateur" / "plan.json").write_text(plan.to_json())
        workspace.publish()
