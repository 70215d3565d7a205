"""All that comes before a weight changes: a budget within reach, calibration, scores, a plan."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from secateur.allocate.base import Allocator, Evidence
from secateur.allocate.plain import PlainWidth
from secateur.calibration.collect import Store
from secateur.calibration.gradients import needs_gradients
from secateur.calibration.layer_stream import TOKENS_PER_BATCH, Stream
from secateur.data.tokens import Calibration, Tokens
from secateur.io.run_directory import Stage, at_once, for_good
from secateur.methods import check_served
from secateur.methods.base import Method
from secateur.models.model import Model, Settings
from secateur.pipeline.input_checks import text_notes
from secateur.pipeline.runtime_checks import check_runtime
from secateur.pipeline.workers import ALONE, Crew
from secateur.planning.plan import (
    Plan,
    check_sizes,
    make_plan,
    prices_of,
    revise,
    usual_allocator,
)
from secateur.scoring.calibration_selection import DRAWS, select_calibration
from secateur.scoring.evidence import identity, keep_evidence, kept_evidence
from secateur.scoring.latency import check_length, check_timed
from secateur.structure.budget import Goal
from secateur.structure.costs import Prices, counted
from secateur.structure.units import DEPTH, MATRICES, STREAM, Matrix, Unit
from secateur.utils.errors import InputError
from secateur.utils.progress import Progress
from secateur.utils.stopwatch import Stopwatch


def chosen_allocator(method: Method, goal: Goal, asked: Allocator | None) -> Allocator:
    """What spends the budget: what was asked for, or what the tier demands, or the method's own.

    Raises:
        InputError: the tier leaves nothing to allocate.
    """
    shaped = goal.tier == "plain" and method.kinds not in (DEPTH, MATRICES)
    if shaped and not isinstance(asked, PlainWidth | None):
        raise InputError(
            f"--tier plain has one MLP width and nothing to allocate. Leave out {asked.flags}, as "
            f"far as given, or ask for --tier per-layer."
        )
    return asked or usual_allocator(method, goal)


def check_reach(shapes: Model, method: Method, goal: Goal, allocator: Allocator) -> None:
    """Refuse a budget out of reach before any weight is read; latency has to be measured first.

    Raises:
        InputError: it is out of reach, or the method is no use for the model or the tier.
    """
    check_served(method, shapes)
    check_runtime(shapes, method, goal)
    units = goal.units(method, shapes)
    if goal.tier == "plain" and any(u.new_bias and len(allocator.choices(u)) > 1 for u in units):
        raise InputError(
            f"--tier plain: {method.name} adds biases, for which stock classes of this family have "
            "no place. Leave them out (--compensate 0), or ask for --tier per-layer."
        )
    matrices = [unit for unit in units if isinstance(unit, Matrix)]
    if goal.tier == "plain" and any(not f.stock for unit in matrices for f in unit.forms):
        raise InputError(
            f"--tier plain: no stock class reads the forms of {method.name}. Leave --tier out."
        )
    if goal.tier == "plain" and any(not unit.published for unit in matrices):
        raise InputError(
            "--tier plain: stock classes of this family keep attention in another layout than the "
            "one that is worked on. Leave --tier out."
        )
    if goal.target == "cache" and not shapes.use.writes:
        raise InputError(
            f"--target cache: this {shapes.use.what} writes nothing, and keeps no keys and values; "
            f"choose another --target, e.g. parameters."
        )
    if goal.target == "latency":
        check_timed(units)
        allocator.check_units(units)
        check_length(shapes, goal)
    else:
        prices = counted(units, goal.target, shapes.stored.itemsize)
        check_keep(allocator, units, prices, method)


def check_keep(allocator: Allocator, units: Sequence[Unit], prices: Prices, method: Method) -> None:
    """Refuse a budget out of reach; as little as there can be is always within.

    Raises:
        InputError: it is out of reach, or the allocator can't spend over these units.
    """
    if method.keep:
        allocator.check(units, prices, method.keep)
    else:
        allocator.check_units(units)


@dataclass
class Prepared:
    """A model with its plan and, unless it is only planned, its statistics; nothing has changed.

    ``observed`` is what ``block_errors.observations`` says once it is narrowed, where
    there is the ``evidence`` that the plan rests on.
    """

    model: Model
    tokens: Tokens
    store: Store
    method: Method
    plan: Plan
    evidence: Evidence | None = None
    observed: dict[str, Any] = field(default_factory=dict)
    crew: Crew = ALONE


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
    stage: Stage = at_once,
    crew: Crew = ALONE,
) -> Prepared:
    """Open a model, calibrate it and decide the sizes, or check those of a given plan.

    Scores that were measured before are used again. ``only_plan`` then needs no calibration. With
    ``stage`` a run keeps what it has found of each block, and a ``crew`` shares the work.

    Raises:
        InputError: anything wrong with the input.
    """
    if scores is not None and not scores.absolute().parent.is_dir():
        with for_good():
            raise InputError(
                f"--scores {str(scores)!r}: there is no folder {str(scores.parent)!r}."
            )
    with watch.measure("open"):
        if crew.ranks.world > 1:
            progress.say(f"{crew.ranks.world} processes share the work")
        model = crew.open(source, settings, store.folder)
        chosen = method.build_method() if isinstance(method, Plan) else method
        if left := model.left_out:
            progress.say(
                f"note: {len(left)} tensors of the file are no part of a {model.use.what} and are "
                f"left out, {left[0]} first"
            )
        for note in model.obstacles_of(chosen.kinds):
            progress.say(f"note: {note}")
        units = goal.units(chosen, model)
        for note in text_notes(calibration, tokens, units, model.use):
            progress.say(f"note: {note}")
    if isinstance(method, Plan):
        with for_good():
            check_sizes(method, model, chosen)
    if model.residence is not None:
        progress.say("the model stays on disk and is read block by block (--stream)")
        with for_good():
            check_streams(chosen, goal, allocator)
    with watch.measure("allocate"):
        if goal.target == "latency":
            progress.say("timing the units on this machine, unless that was done before")
        prices = prices_of(model, units, goal)
        if not isinstance(method, Plan):
            with for_good():
                check_keep(allocator, units, prices, chosen)
    if calibration.select != "none" and not calibration.windows:
        with (
            watch.measure("select"),
            progress.stage("choosing calibration text", DRAWS) as advance,
        ):
            calibration = select_calibration(
                model, calibration, chosen, goal, allocator, advance, store.folder
            )
            tokens = model.use.calibration(calibration, model.tokenizer)
    if calibration.windows:
        count = len(calibration.windows)
        progress.say(f"calibrating on {count} windows chosen by {calibration.select}")
    own, every = identity(model, chosen, tokens, allocator), chosen.units(model, 1)
    needs = chosen.needs | allocator.needs
    known = ("secateur", "model", "calibration", "dtype")
    store.claim({key: own[key] for key in known}, needs, model.blocks)
    evidence = kept_evidence(own, every, scores)
    searches = allocator.searches and not isinstance(method, Plan)
    if evidence is None or not only_plan or searches:
        seconds = _forward_seconds if model.residence is None else _streamed_seconds
        watch.seconds["calibration_forward"] = seconds(model, tokens)
        if not all(block.index in store for block in model.blocks):
            with (
                watch.measure("calibrate"),
                progress.stage("calibrating, block by block", len(model.blocks)) as advance,
            ):
                crew.calibrate(model, tokens, needs, store, advance)
    if evidence is None:
        with watch.measure("curves"), progress.stage("scoring units", len(every)) as advance:
            evidence = crew.score(model, chosen, store, tokens, allocator, advance, stage)
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
            given = (goal, allocator, prices, store)
            judgements = allocator.judgements(units, prices, chosen.keep)
            with progress.stage("choosing sizes", judgements) as advance:
                plan = make_plan(model, chosen, evidence, calibration, tokens, *given, advance)
    return Prepared(model, tokens, store, chosen, plan, evidence, crew=crew)


def check_streams(method: Method, goal: Goal, allocator: Allocator) -> None:
    """Refuse what looks at the whole model at once, where its blocks come one at a time.

    Raises:
        InputError: the method, the target or the allocator does; the message names it.
    """
    needed = method.needs | allocator.needs
    reasons = {
        f"{method.name} turns the stream between all blocks": method.kinds == STREAM,
        "gradients take a backward pass of the whole model": any(map(needs_gradients, needed)),
        f"allocator {allocator.name} tries whole plans out": allocator.searches,
        "--target latency times the whole model": goal.target == "latency",
        f"{method.name} packs integers, which its result unpacks all at once": method.final,
    }
    for reason, holds in reasons.items():
        if holds:
            raise InputError(
                f"{reason}, and this model stays on disk and is read block by block. Choose "
                f"another, or give it memory for the whole model (--stream off)."
            )


def _streamed_seconds(model: Model, tokens: Tokens) -> float:
    """The same of a model that is read block by block, from its first block; reading left aside."""
    rows = min(len(tokens), max(1, TOKENS_PER_BATCH // tokens.length))
    with torch.no_grad(), model.resident(first := model.blocks[0]):
        stream = Stream(model, tokens[:rows])
        (batch,) = stream.batches
        start = time.perf_counter()
        float(stream.through(first, stream.at(batch))[0, 0, 0])  # waits for a GPU
        return (time.perf_counter() - start) * len(model.blocks) * len(tokens) / rows


def _forward_seconds(model: Model, tokens: Tokens) -> float:
    """What a plain forward pass over the calibration tokens takes, scaled up from one batch."""
    rows = min(len(tokens), max(1, TOKENS_PER_BATCH // tokens.length))
    given = tokens[:rows].to(model.device)
    with torch.inference_mode():
        body = model.module.base_model  # only gradients and measured losses ask the head
        body(**model.use.inputs(given[:1]))
        start = time.perf_counter()
        float(body(**model.use.inputs(given))[0][0, 0, 0])  # waits for a GPU
        return (time.perf_counter() - start) * len(tokens) / rows
