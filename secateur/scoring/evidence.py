"""Scores: what calibration says about every unit, measured once and kept for every budget."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import FiniteFloat, ValidationError, field_validator

from secateur.allocate.base import Allocator, Evidence
from secateur.apply.residual_slicing import place_curves
from secateur.calibration.collect import Store
from secateur.calibration.needs import of_unit
from secateur.data.tokens import Tokens
from secateur.distributed.collectives import ALONE, Ranks
from secateur.io.cache import cached_file, keep
from secateur.io.run_directory import Content, Memo, at_once, write_whole
from secateur.io.schema import Parts, Record, read_record, said
from secateur.methods import check_served
from secateur.methods.base import Method, Solution
from secateur.models.block import Block
from secateur.models.model import Model, fingerprint
from secateur.scoring.divergence import Divergence, Trials, measure_losses, windows_to_measure
from secateur.structure.error_curve import Curve
from secateur.structure.units import EVERY_BLOCK, Unit
from secateur.utils.errors import InputError, refuse_difference

SINCE = "0.3.0"  # the version that last changed what statistics and scores mean
MAX_BYTES = 2**29
MAX_UNITS = 2**16


class Scores(Record):
    """Evidence on disk, with everything that it depends on.

    Attributes:
        secateur: version that measured it.
        model: fingerprint of the weights.
        calibration: fingerprint of the token windows.
        dtype: number format that it was computed in.
        method: name of the method.
        options: its fields.
        reading: what the allocator read of every block.
        measured: whether losses are in it.
    """

    most_values = 2**24  # with losses, 70B parameters have 4.6 million numbers and 405B 13 million

    version: Literal[2] = 2
    secateur: str
    model: str
    calibration: str
    dtype: str
    method: str
    options: dict[str, int | float | str]
    reading: str
    measured: bool
    readings: Parts[Parts[FiniteFloat]]
    curves: dict[str, Parts[FiniteFloat]]
    losses: dict[str, Parts[FiniteFloat]] | None

    @field_validator("curves", "losses", mode="before")
    @classmethod
    def _few(cls, found: Any) -> Any:
        if isinstance(found, dict) and len(found) > MAX_UNITS:
            raise ValueError(f"more than {MAX_UNITS} units")
        return found


class Found(Record):
    """What is found of one block: the part of the evidence that a run keeps.

    Attributes:
        places: of each unit that runs through all blocks, its curve at every place in this one.
    """

    curves: dict[str, Parts[FiniteFloat]]
    losses: dict[str, Parts[FiniteFloat]]
    reading: Parts[FiniteFloat]
    places: dict[str, Parts[Parts[FiniteFloat]]]


@dataclass(frozen=True)
class _Kept:
    """What is found of the blocks, by way of what a run keeps."""

    memo: Memo
    changing: Sequence[Unit]
    through: Sequence[Unit]
    measured: bool

    def earlier(self, model: Model, ranks: Ranks) -> dict[int, Found]:
        """What an earlier run has found, by block; the leader alone has it on disk."""

        def read() -> list[Content | None]:
            found = [self._before(block.index) for block in model.blocks]
            return [None if own is None else own.model_dump() for own in found]

        every = zip(model.blocks, ranks.broadcast(read), strict=True)
        return {b.index: Found.model_validate(own) for b, own in every if own is not None}

    def _before(self, block: int) -> Found | None:
        def missing() -> Content:
            raise _MissingError

        try:
            return self.memo(f"scores-{block}", missing, lambda kept: self._held(block, kept))
        except _MissingError:
            return None

    def together(self, own: Mapping[int, Content], ranks: Ranks) -> dict[int, Found]:
        """What all ranks have found of some blocks."""
        parts = ranks.all_gather([*own.values()])
        return {
            block: self._whole(block, found)
            for block, found in zip(own, zip(*parts, strict=True), strict=True)
        }

    def _whole(self, block: int, parts: Sequence[Content]) -> Found:
        whole: Content = {"curves": {}, "losses": {}}
        for own in parts:
            whole = {**whole, **own, **{k: whole[k] | own[k] for k in ("curves", "losses")}}
        return self.memo(f"scores-{block}", lambda: whole, lambda kept: self._held(block, kept))

    def _held(self, block: int, content: Content) -> Found:
        """Plain data, held against the units of the block."""
        named = f"scores of block {block}"
        try:
            found = Found.model_validate(content)
        except ValidationError as error:
            raise InputError(f"{named}: {said(error)}.") from error
        sizes = {unit.name: unit.size + 1 for unit in self.changing if unit.block == block}
        places = {unit.name: {unit.size + 1} for unit in self.through}
        right = (
            _lengths(found.curves) == sizes
            and _lengths(found.losses) == (sizes if self.measured else {})
            and {name: {*map(len, own)} for name, own in found.places.items()} == places
        )
        if not right or not found.reading:
            raise InputError(f"{named}: they don't match its units.")
        return found


class _MissingError(Exception):
    """No earlier run has it."""


def _lengths(curves: Mapping[str, Sequence[float]]) -> dict[str, int]:
    return {name: len(curve) for name, curve in curves.items()}


def identity(model: Model, method: Method, tokens: Tokens, allocator: Allocator) -> dict[str, Any]:
    """The fields that say what scores are of."""
    return {
        "secateur": SINCE,
        "model": fingerprint(model),
        "calibration": tokens.fingerprint,
        "dtype": str(model.module.dtype).removeprefix("torch."),
        "method": method.name,
        "options": asdict(method),
        "reading": allocator.reading,
        "measured": allocator.measured,
    }


def kept_evidence(own: dict[str, Any], units: Sequence[Unit], file: Path | None) -> Evidence | None:
    """Evidence of this identity from ``file``, or from the user's cache, or None.

    Raises:
        InputError: the file is of something else; the message names the field that differs.
    """
    if file is not None:
        return (
            _evidence(read_record(Scores, file, "scores", MAX_BYTES), own, units, file)
            if file.exists()
            else None
        )
    for measured in sorted({own["measured"], True}):  # one with losses serves too
        wanted = own | {"measured": measured}
        path = cached_file("scores", wanted)
        try:
            if path.exists():
                return _evidence(
                    read_record(Scores, path, "scores", MAX_BYTES), wanted, units, path
                )
        except InputError:  # a damaged cache is measured again
            continue
    return None


def _evidence(scores: Scores, own: dict[str, Any], units: Sequence[Unit], path: Path) -> Evidence:
    there = {name: getattr(scores, name) for name in own}
    if scores.measured:  # what has losses serves those who need none
        own = own | {"measured": True}
    advice = "Name another --scores file, or repeat what they were made with."
    refuse_difference(f"scores {str(path)!r}", there, own, advice)
    if scores.measured and scores.losses is None:
        raise InputError(f"scores {str(path)!r}: losses are missing, though they were measured.")
    blocks = 1 + max(unit.block for unit in units)  # 0 where one unit runs through all
    if blocks and len(scores.readings) != blocks:
        raise InputError(f"scores {str(path)!r}: readings don't match the blocks of the model.")
    sizes = {unit.name: unit.size + 1 for unit in units}
    for field in ("curves", "losses") if scores.losses is not None else ("curves",):
        if _lengths(getattr(scores, field)) != sizes:
            raise InputError(f"scores {str(path)!r}: {field} don't match the units of the model.")
    return Evidence(
        {name: Curve(errors) for name, errors in scores.curves.items()},
        scores.readings,
        None if scores.losses is None else {n: Curve(x) for n, x in scores.losses.items()},
    )


def keep_evidence(own: dict[str, Any], evidence: Evidence, file: Path | None) -> None:
    """Write evidence where :func:`kept_evidence` finds it."""
    losses = evidence.losses
    scores = Scores(
        **own,
        readings=tuple(evidence.readings),
        curves={name: curve.errors for name, curve in evidence.curves.items()},
        losses=None if losses is None else {name: c.errors for name, c in losses.items()},
    )
    if file is None:
        keep(cached_file("scores", own), scores.model_dump_json())
    else:
        write_whole(file, scores.model_dump_json())


def score(
    model: Model,
    method: Method,
    store: Store,
    tokens: Tokens,
    allocator: Allocator | None = None,
    advance: Callable[[int], None] = lambda _: None,
    memo: Memo = at_once,
    ranks: Ranks = ALONE,
) -> Evidence:
    """Every unit's predicted error at every size, readings of every block, and measured losses.

    Losses only where ``allocator``, by default the method's own, spends by them. One evidence
    serves every budget, target and multiple. ``advance`` is told how many units are done, and
    ``memo`` may have what is found of a block from an earlier run. On several ``ranks`` each has
    its share of the units of every block, and all have all the evidence.
    """
    check_served(method, model)
    allocator = allocator or method.allocator
    units = method.units(model, 1)
    allocator.check_units(units)
    with torch.no_grad():
        scoring = _Scoring(model, method, store, allocator, units, ranks=ranks, advance=advance)
        if allocator.measured:
            memo = scoring.measure_on(tokens, memo)
        kept = _Kept(memo, scoring.changing, scoring.through, scoring.divergence is not None)
        found, pending = kept.earlier(model, ranks), dict[int, Content]()
        for block in model.in_turn():
            if block.index in found:  # an interrupted run has them
                scoring.skip(block)
                continue
            pending[block.index] = scoring.of_block(block)
            if len(pending) == ranks.world_size:  # of so many blocks each has as much as the others
                found |= kept.together(pending, ranks)
                pending = {}
        if pending:
            found |= kept.together(pending, ranks)
        losses = scoring.late_losses()
    return scoring.evidence([found[block.index] for block in model.blocks], losses)


class _Scoring:
    """What is found of one block after the other, and the evidence that it makes together."""

    def __init__(
        self,
        model: Model,
        method: Method,
        store: Store,
        allocator: Allocator,
        units: Sequence[Unit],
        *,
        ranks: Ranks,
        advance: Callable[[int], None],
    ) -> None:
        self.model, self.method, self.store, self.allocator = model, method, store, allocator
        self.units, self.ranks, self.advance = units, ranks, advance
        self.through = [unit for unit in units if unit.block == EVERY_BLOCK]
        self.changing = [unit for unit in units if not unit.fixed]
        self.mine = _dealt(self.changing, ranks)
        self.divergence: Divergence | None = None
        self.trials: Trials | None = None

    def measure_on(self, tokens: Tokens, memo: Memo) -> Memo:
        """Measure losses, too; the answer is what may keep them.

        Of a model that is read block by block they are known at the end only, so nothing does.
        """
        few = windows_to_measure(tokens, len(self.changing))
        if self.model.offload is None:
            self.divergence = Divergence(self.model, few)
            return memo
        self.trials = Trials(self.model, few, len(self.mine))
        return at_once

    def _of(self, block: Block) -> list[Unit]:
        return [unit for unit in self.changing if unit.block == block.index]

    def skip(self, block: Block) -> None:
        """Go past a block of which all is known."""
        self.advance(len(self._of(block)))
        if self.divergence is not None:
            self.divergence.advance(block)

    def of_block(self, block: Block) -> Content:
        """Curves and losses of this process's units, and the allocator's reading of its blocks."""
        every, needs = self._of(block), self.method.needs | self.allocator.needs
        own = [unit for unit in every if unit.name in self.mine]
        self.advance(len(every) - len(own))
        statistics = self.store.get(block.index, needs, self.model.exact_device)
        with block.solving():
            solutions = {
                unit.name: self.method.solve(unit, block, of_unit(statistics, unit)) for unit in own
            }
            curves = {name: solution.curve.errors for name, solution in solutions.items()}
        measured = self._losses(block, own, solutions)
        found: Content = {
            "curves": curves,
            "losses": {name: curve.errors for name, curve in measured.items()},
        }
        if self.ranks.owns(block.index):
            with block.solving():
                reading = self.allocator.read(block, statistics)
                places = {
                    unit.name: place_curves(self.method, unit, block, statistics)
                    for unit in self.through
                }
            found |= {
                "reading": reading,
                "places": {name: [c.errors for c in there] for name, there in places.items()},
            }
        return found

    def _losses(
        self, block: Block, own: Sequence[Unit], solutions: Mapping[str, Solution]
    ) -> Mapping[str, Curve]:
        if self.trials is not None:
            self.trials.of_block(block, own, solutions, self.advance)
        elif self.divergence is not None:
            return measure_losses(self.divergence, block, own, solutions, self.advance)
        else:
            self.advance(len(own))
        return {}

    def late_losses(self) -> dict[str, Curve]:
        """The losses that are known once all blocks were gone through, of all processes."""
        if self.trials is None:
            return {}
        tried = [unit for unit in self.changing if unit.name in self.mine]
        with self.model.headed():
            measured = self.trials.losses(tried)
        parts = self.ranks.all_gather({n: curve.errors for n, curve in measured.items()})
        return {name: Curve(tuple(e)) for part in parts for name, e in part.items()}

    def evidence(self, found: Sequence[Found], losses: dict[str, Curve]) -> Evidence:
        """All of it together; a unit that never changes never errs."""
        curves = {name: Curve(tuple(c)) for own in found for name, c in own.curves.items()}
        losses |= {name: Curve(tuple(c)) for own in found for name, c in own.losses.items()}
        for unit in self.units:
            if unit.fixed:
                curves[unit.name] = losses[unit.name] = Curve((0.0,) * (unit.size + 1))
        for unit in self.through:
            places = [Curve(c) for own in found for c in own.places[unit.name]]
            curves[unit.name] = Curve.mean(places)
        self.advance(len(self.units) - sum(unit.block != EVERY_BLOCK for unit in self.changing))
        readings = [own.reading for own in found]
        curves = {unit.name: curves[unit.name] for unit in self.units}  # in whatever order
        if not self.allocator.measured:
            return Evidence(curves, readings)
        kept = {u.name: losses[u.name] for u in self.units if u.name in losses}
        return Evidence(curves, readings, kept)


def _dealt(units: Sequence[Unit], ranks: Ranks) -> set[str]:
    """Names of those that this process solves: of every block some, and of every kind."""
    seen: dict[int, int] = {}
    found = set()
    for unit in units:
        place = seen[unit.block] = seen.get(unit.block, -1) + 1
        if ranks.owns(unit.block + place):
            found.add(unit.name)
    return found
