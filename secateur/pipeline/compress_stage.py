"""Compressing as a stage: prepare, then prune or quantize block by block into a checkpoint."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.apply.block_errors import BlockComparison, observations
from secateur.apply.block_journal import Journal, States
from secateur.apply.save import finish, store_block, writer_for
from secateur.apply.sequential import narrow_blocks
from secateur.calibration.collect import Store
from secateur.data.tokens import Tokens
from secateur.distributed.collectives import ALONE, Ranks
from secateur.evaluate.verify import Passage, ReferenceOutputs, reference_outputs
from secateur.io.run_directory import NARROWING, at_once
from secateur.io.safetensors_writer import Writer
from secateur.methods.step import Step
from secateur.models.block import Block
from secateur.pipeline.context import RunContext
from secateur.pipeline.prepare import Prepared, prepare
from secateur.pipeline.run_inputs import Inputs
from secateur.planning.plan import Plan
from secateur.planning.stage import StageResult
from secateur.structure.selection import Selection
from secateur.structure.units import EVERY_BLOCK, STREAM
from secateur.utils.stopwatch import Stopwatch

REFERENCE_TOKENS = 24


@dataclass(frozen=True)
class CompressStage:
    """One method on one checkpoint, as a :class:`~secateur.planning.stage.Stage`.

    Attributes:
        step: the method, its budget and its allocator.
        inputs: the calibration data, and how the checkpoint is opened.
        statistics: folder for the calibration's statistics.
        scores: file of the units' scores, as for ``compress``.
        plan: sizes to apply, in place of deciding them.
        resumes: whether it notes after each block, in the run's directory, how far it is.
    """

    step: Step
    inputs: Inputs
    statistics: Path
    scores: Path | None = None
    plan: Plan | None = None
    resumes: bool = False

    @property
    def name(self) -> str:
        """The method's."""
        return self.step.method.name

    def as_dict(self) -> dict[str, Any]:
        """The step, as a recipe's file has it."""
        return self.step.as_dict()

    def run(self, source: str, out: Path, context: RunContext) -> StageResult:
        """Calibrate ``source``, decide the sizes and write the compressed checkpoint.

        Raises:
            InputError: anything wrong with the input.
        """
        directory = context.directory if self.resumes else None
        prepared = prepare(
            replace(self.inputs, source=source),
            self.step,
            context,
            store=Store(self.statistics),
            scores=self.scores,
            plan=self.plan,
            memo=at_once if directory is None else directory.stage,
        )
        journal = None if directory is None else directory.folder / NARROWING
        said = write(prepared, out, context, journal)
        return StageResult(prepared.plan, prepared.observed, said)


def write(
    prepared: Prepared, folder: Path, context: RunContext, kept: Path | None = None
) -> ReferenceOutputs | None:
    """Compress the model block by block into a checkpoint, and note what it then answers.

    Leaves the model in ``prepared`` compressed and, from those answers, in bfloat16, and there what
    was observed, and in its plan the selection of what units keep. In ``kept`` it is noted after
    each block how far that is, so that it goes on from there when it is called again. All ranks
    compress; the leader alone writes, and has the answers.
    """
    ranks, whole = context.ranks, any(u.block == EVERY_BLOCK for u in prepared.units)
    output = _Output.of(prepared, folder, kept, ranks) if ranks.leader else None
    if whole:  # one thing, from the first block to the last
        ranks = ALONE
    if whole and output is None:
        return None
    journal = _shared_journal(None if output is None else output.journal, ranks)
    stays = _compress_blocks(prepared, context, output, journal, ranks)
    prepared.plan = prepared.plan.with_selection(Selection(stays) if stays else None)
    return None if output is None else output.finished(context)


def _shared_journal(journal: Journal | None, ranks: Ranks) -> States | None:
    """The leader's journal, or where another rank keeps its part of the hidden states."""

    def described() -> list[Any] | None:
        return None if journal is None else [str(journal.folder.absolute()), journal.done]

    found = ranks.broadcast(described)
    if ranks.leader or found is None:
        return journal
    folder, done = found
    return States(Path(folder), done, ranks)


@dataclass
class _Output:
    """The checkpoint that is written, and what is noted of its blocks."""

    prepared: Prepared
    writer: Writer
    journal: Journal | None
    first: Tokens
    followers: "_Followers"

    @classmethod
    def of(cls, prepared: Prepared, folder: Path, kept: Path | None, ranks: Ranks) -> "_Output":
        model, plan = prepared.model, prepared.plan
        writer = writer_for(model, plan.tier, folder)
        journal = None
        if kept is not None and prepared.step.method.kinds != STREAM:
            journal = Journal(
                kept,
                writer,
                plan.sizes,
                streamed=model.offload is not None,
                ranks=ranks,
                selection=plan.selected,
            )
        first = model.use.beginning(prepared.tokens, REFERENCE_TOKENS)
        return cls(prepared, writer, journal, first, _Followers.of(prepared, first, journal))

    def take(self, block: Block, watch: Stopwatch) -> None:
        """Write a compressed block, and go through it."""
        with watch.measure("save"):
            store_block(self.prepared.model, block, self.writer)
        with watch.measure("evaluate"):
            self.followers.follow(block)

    def finished(self, context: RunContext) -> ReferenceOutputs:
        """Write the rest of the model, and note what it answers."""
        prepared, followers, model = self.prepared, self.followers, self.prepared.model
        with context.watch.measure("evaluate"):
            said = None if followers.passage is None else followers.passage.reference_outputs()
            if prepared.evidence is not None:
                given = (prepared.store, prepared.evidence, followers.errors)
                prepared.observed = observations(prepared.units, followers.blocks, *given)
        with context.watch.measure("save"):
            finish(model, prepared.plan.tier, self.writer, settle=self.journal is None)
        with context.watch.measure("evaluate"):
            said = reference_outputs(model, self.first) if said is None else said
            return ReferenceOutputs(said, self.first)


@dataclass
class _Followers:
    """What goes through every block as soon as it is compressed.

    Attributes:
        blocks: how many the dense model has.
        comparison: compares each block with the dense one.
        passage: takes the answers of a model that is never whole in memory.
    """

    blocks: int
    comparison: BlockComparison | None
    passage: Passage | None

    @classmethod
    def of(cls, prepared: Prepared, first: Tokens, journal: Journal | None) -> "_Followers":
        model, comparison = prepared.model, None
        passage = None if model.offload is None else Passage(model, first)
        if prepared.evidence is not None and prepared.step.method.kinds != STREAM:
            comparison = BlockComparison(model, prepared.tokens)
        if journal is not None:
            if comparison is not None:
                comparison.errors = journal.errors  # one list
                journal.attach("comparison", comparison.line)
            if passage is not None:
                journal.attach("passage", passage.line)
        return cls(len(model.blocks), comparison, passage)

    def follow(self, block: Block) -> None:
        """Go through the next block."""
        for follower in (self.comparison, self.passage):
            if follower is not None:
                follower.follow(block)

    @property
    def errors(self) -> list[dict[str, float | None]]:
        """What the comparison has found."""
        return [] if self.comparison is None else self.comparison.errors


def _compress_blocks(
    prepared: Prepared,
    context: RunContext,
    output: _Output | None,
    journal: States | None,
    ranks: Ranks,
) -> dict[str, Tensor]:
    """Bring every block to its sizes, one after the other, and say what its units keep.

    There may be an output for them.
    """
    model, plan, watch = prepared.model, prepared.plan, context.watch
    kept = {} if plan.selected is None else dict(plan.selected.kept)
    if isinstance(journal, Journal):
        kept = journal.kept
    narrowed = narrow_blocks(
        model,
        prepared.step.method,
        prepared.units,
        plan.sizes,
        tokens=prepared.tokens,
        store=prepared.store,
        journal=journal,
        ranks=ranks,
        kept=kept,
    )
    with context.progress.stage("narrowing and writing", len(model.blocks)) as advance:
        advance(journal.done if journal is not None else 0)
        while True:
            with watch.measure("apply"):
                block = next(narrowed, None)
            if block is None:
                break
            if output is not None:
                output.take(block, watch)
            if journal is not None:
                with watch.measure("save"):
                    journal.record(block)
            if model.offload is not None:
                model.offload.leave(block)
            advance(1)
    return kept
