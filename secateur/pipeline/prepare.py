"""All that comes before a weight changes: a budget within reach, calibration, scores, a plan."""

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.allocate.base import Evidence
from secateur.calibration.collect import Store, calibrate
from secateur.calibration.gradients import needs_gradients
from secateur.calibration.layer_stream import TOKENS_PER_BATCH, Stream
from secateur.data.tokens import Tokens
from secateur.io.run_directory import Memo, at_once, for_good
from secateur.methods import check_served
from secateur.methods.fitted import FittedMethod
from secateur.methods.step import Step
from secateur.models.model import Model
from secateur.pipeline.context import RunContext
from secateur.pipeline.input_checks import text_notes
from secateur.pipeline.run_inputs import Inputs
from secateur.pipeline.runtime_checks import check_runtime
from secateur.pipeline.shared_model import open_shared, shared_store
from secateur.planning.checks import check_sizes
from secateur.planning.plan import Plan
from secateur.planning.planner import make_plan, revise
from secateur.scoring.calibration_selection import DRAWS, select_calibration
from secateur.scoring.evidence import identity, keep_evidence, kept_evidence, score
from secateur.scoring.latency import check_length, check_timed
from secateur.scoring.prices import prices_of
from secateur.structure.costs import Prices, counted
from secateur.structure.selection import Selection
from secateur.structure.units import STREAM, Matrix, Unit
from secateur.utils.errors import InputError


def check_reach(shapes: Model, step: Step) -> None:
    """Refuse a budget out of reach before any weight is read; latency has to be measured first.

    Raises:
        InputError: it is out of reach, or the method is no use for the model or the tier.
    """
    step = step.filled
    check_served(step.method, shapes)
    check_runtime(shapes, step)
    units, budget, allocator = step.units(shapes), step.budget, step.allocator
    if budget.tier == "plain":
        _check_plain(step, units)
    if budget.target == "cache" and not shapes.use.writes:
        raise InputError(
            f"--target cache: this {shapes.use.what} writes nothing, and keeps no keys and values; "
            f"choose another --target, e.g. parameters."
        )
    if budget.target == "latency":
        check_timed(units)
        allocator.check_units(units)
        check_length(shapes, budget)
    else:
        prices = counted(units, budget.counts, shapes.stored.itemsize)
        allocator.check(units, prices, budget.share)


def _check_plain(step: Step, units: list[Unit]) -> None:
    """Refuse what no stock class has a place for.

    Raises:
        InputError: biases or forms that the method adds, or a layout of attention of our own.
    """
    method, allocator = step.method, step.allocator
    if any(unit.new_bias and len(allocator.choices(unit)) > 1 for unit in units):
        raise InputError(
            f"--tier plain: {method.name} adds biases, for which stock classes of this family have "
            "no place. Leave them out (--compensate 0), or ask for --tier per-layer."
        )
    matrices = [unit for unit in units if isinstance(unit, Matrix)]
    if any(not form.stock for unit in matrices for form in unit.forms):
        raise InputError(
            f"--tier plain: no stock class reads the forms of {method.name}. Leave --tier out."
        )
    if any(not unit.published for unit in matrices):
        raise InputError(
            "--tier plain: stock classes of this family keep attention in another layout than the "
            "one that is worked on. Leave --tier out."
        )


@dataclass
class Prepared:
    """A model with its plan and, unless it is only planned, its statistics; nothing has changed.

    Attributes:
        units: what the plan gives sizes to.
        evidence: what the plan rests on, if that is known.
        observed: what ``block_errors.observations`` says once the model is compressed, where there
            is the evidence.
    """

    model: Model
    tokens: Tokens
    store: Store
    step: Step
    plan: Plan
    units: list[Unit]
    evidence: Evidence | None = None
    observed: dict[str, Any] = field(default_factory=dict)


def prepare(
    inputs: Inputs,
    step: Step,
    context: RunContext,
    *,
    store: Store,
    scores: Path | None = None,
    plan: Plan | None = None,
    only_plan: bool = False,
    memo: Memo = at_once,
) -> Prepared:
    """Open a model, calibrate it and decide the sizes, or check those of a given ``plan``.

    Scores that were measured before are used again. ``only_plan`` then needs no calibration. With
    ``memo`` a run keeps what it has found of each block.

    Raises:
        InputError: anything wrong with the input.
    """
    step, ranks = step.filled, context.ranks
    if scores is not None and not scores.absolute().parent.is_dir():
        with for_good():
            raise InputError(
                f"--scores {str(scores)!r}: there is no folder {str(scores.parent)!r}."
            )
    store = shared_store(store, ranks)
    model, units = _opened(inputs, step, context, store)
    if plan is not None:
        with for_good():
            check_sizes(plan, model, step.method)
    if model.offload is not None:
        context.progress.say("the model stays on disk and is read block by block (--stream)")
        with for_good():
            check_streams(step)
    prices = _priced(model, units, step, context) if ranks.leader else None
    if plan is None and prices is not None:
        with for_good():
            step.allocator.check(units, prices, step.budget.share)
    inputs = _chosen_text(model, inputs, step, context, store)
    looks = step.allocator.searches or isinstance(step.method, FittedMethod)
    only = only_plan and (plan is not None or not looks)
    measuring = _Measuring(model, inputs, step, context, store)
    evidence = measuring.evidence(scores, memo, only)
    with context.watch.measure("allocate"):
        if plan is not None and plan.calibration.fingerprint != inputs.tokens.fingerprint:
            context.progress.say("note: this plan was made from other calibration tokens")

        def decided() -> tuple[str, dict[str, Tensor]]:
            assert evidence is not None
            assert prices is not None
            if plan is not None:
                found = revise(plan, model, step.method, evidence, prices)
            else:
                found = measuring.planned(units, evidence, prices)
            kept = {} if found.selected is None else dict(found.selected.kept)
            return found.to_json(), kept

        text, kept = ranks.broadcast(decided)
        plan = Plan.model_validate_json(text).with_selection(Selection(kept) if kept else None)
    return Prepared(model, inputs.tokens, store, step, plan, units=units, evidence=evidence)


def _opened(
    inputs: Inputs, step: Step, context: RunContext, store: Store
) -> tuple[Model, list[Unit]]:
    """The model and its units, with notes about both."""
    ranks, say = context.ranks, context.progress.say
    with context.watch.measure("open"):
        if not ranks.alone:
            say(f"{ranks.world_size} processes share the work")
        model = open_shared(inputs.source, inputs.settings, store.folder, ranks)
        if left := model.left_out:
            say(
                f"note: {len(left)} tensors of the file are no part of a {model.use.what} and are "
                f"left out, {left[0]} first"
            )
        for note in model.obstacles_of(step.method.kinds):
            say(f"note: {note}")
        units = step.units(model)
        for note in text_notes(inputs.calibration, inputs.tokens, units, model.use):
            say(f"note: {note}")
    return model, units


def _priced(model: Model, units: list[Unit], step: Step, context: RunContext) -> Prices:
    with context.watch.measure("allocate"):
        if step.budget.target == "latency":
            context.progress.say("timing the units on this machine, unless that was done before")
        return prices_of(model, units, step.budget)


def _chosen_text(
    model: Model, inputs: Inputs, step: Step, context: RunContext, store: Store
) -> Inputs:
    """The inputs with the windows that the calibration asks to be chosen."""
    calibration, progress = inputs.calibration, context.progress
    if calibration.select != "none" and not calibration.windows:
        with (
            context.watch.measure("select"),
            progress.stage("choosing calibration text", DRAWS) as advance,
        ):
            windows = context.ranks.broadcast(
                lambda: (
                    select_calibration(
                        model,
                        calibration,
                        step.method,
                        step.budget,
                        step.allocator,
                        advance=advance,
                        folder=store.folder,
                    ).windows
                )
            )
            calibration = replace(calibration, windows=tuple(windows))
            tokens = model.use.calibration(calibration, model.tokenizer)
        inputs = replace(inputs, calibration=calibration, tokens=tokens)
    if calibration.windows:
        count = len(calibration.windows)
        progress.say(f"calibrating on {count} windows chosen by {calibration.select}")
    return inputs


@dataclass
class _Measuring:
    """What calibration says about the units of an open model."""

    model: Model
    inputs: Inputs
    step: Step
    context: RunContext
    store: Store

    def evidence(self, scores: Path | None, memo: Memo, only_plan: bool) -> Evidence | None:
        """Scores that are kept, or else measured; the statistics, too, but for a plan alone.

        Those that are kept are read by the leader alone.
        """
        ranks = self.context.ranks
        model, method, allocator = self.model, self.step.method, self.step.allocator
        tokens = self.inputs.tokens
        own, every = identity(model, method, tokens, allocator), method.units(model, 1)
        known = ("secateur", "model", "calibration", "dtype")
        needs = method.needs | allocator.needs
        found = None
        if ranks.leader:
            self.store.claim({key: own[key] for key in known}, needs, model.blocks)
            found = kept_evidence(own, every, scores)
        kept = ranks.agree(found is not None)
        if not (kept and only_plan):
            self._calibrate()
        if not kept:
            with (
                self.context.watch.measure("curves"),
                self.context.progress.stage("scoring units", len(every)) as advance,
            ):
                found = score(
                    model,
                    method,
                    self.store,
                    tokens,
                    allocator,
                    advance=advance,
                    memo=memo if ranks.leader else at_once,
                    ranks=ranks,
                )
            if ranks.leader:
                keep_evidence(own, found, scores)
        if found is not None and not allocator.measured:
            # whatever the cache holds, the same command gives one plan
            found = replace(found, losses=None)
        return found

    def _calibrate(self) -> None:
        """Statistics of every block, unless the store has them."""
        model, tokens, context = self.model, self.inputs.tokens, self.context
        if context.ranks.leader:
            seconds = _forward_seconds if model.offload is None else _streamed_seconds
            context.watch.seconds["calibration_forward"] = seconds(model, tokens)
        if context.ranks.broadcast(lambda: all(b.index in self.store for b in model.blocks)):
            return
        needs = self.step.method.needs | self.step.allocator.needs
        with (
            context.watch.measure("calibrate"),
            context.progress.stage("calibrating, block by block", len(model.blocks)) as advance,
        ):
            calibrate(model, tokens, needs, self.store, advance=advance, ranks=context.ranks)

    def planned(self, units: list[Unit], evidence: Evidence, prices: Prices) -> Plan:
        """The sizes that the allocator decides on."""
        budget, allocator, progress = self.step.budget, self.step.allocator, self.context.progress
        judgements = 0
        if allocator.searches and not isinstance(budget.share, str):
            progress.say("searching: every candidate is judged on calibration text")
            judgements = allocator.judgements(units, prices, budget.share)
        with progress.stage("choosing sizes", judgements) as advance:
            return make_plan(
                self.model,
                self.step.method,
                evidence,
                self.inputs.calibration,
                self.inputs.tokens,
                budget=budget,
                allocator=allocator,
                prices=prices,
                store=self.store,
                advance=advance,
            )


def check_streams(step: Step) -> None:
    """Refuse what looks at the whole model at once, where its blocks come one at a time.

    Raises:
        InputError: the method, the target or the allocator does; the message names it.
    """
    method, allocator = step.method, step.allocator
    needed = method.needs | allocator.needs
    reasons = {
        f"{method.name} turns the stream between all blocks": method.kinds == STREAM,
        "gradients take a backward pass of the whole model": any(map(needs_gradients, needed)),
        f"{method.name} looks at all units at once": isinstance(method, FittedMethod),
        f"allocator {allocator.name} tries whole plans out": allocator.searches,
        "--target latency times the whole model": step.budget.target == "latency",
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
