"""What narrowing one unit costs the whole model: divergence of its output, measured."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from secateur.apply.surgery import narrowed
from secateur.calibration.forward_batches import rows_at_once
from secateur.calibration.layer_stream import Stream
from secateur.data.tokens import Tokens
from secateur.methods.base import Solution
from secateur.models.block import Block
from secateur.models.model import Model
from secateur.structure.error_curve import Curve
from secateur.structure.narrowing import Narrowing
from secateur.structure.units import Matrix, Unit
from secateur.utils.errors import InputError
from secateur.utils.precision import exact

#: sizes measured of every unit, as shares of today's; between them its own curve is used
SHARES = (0.0, 1 / 3, 2 / 3)
#: what measuring may cost, in forward passes over the calibration tokens, the head left aside
PASSES = 4.5


class Divergence:
    """KL divergence of the model's output, while a unit is narrowed, from that of the dense model.

    In nats, mean over the outputs that count of some calibration windows. Hidden states are kept
    before the block at hand, so only the blocks behind it run again. With p the dense model's
    probabilities and z the narrowed one's logits, KL = Σ p log p − Σ p z + log Σ exp z. All p are
    kept on the CPU, in float32: outputs × vocabulary numbers.
    """

    def __init__(self, model: Model, tokens: Tokens) -> None:
        self.model = model
        self.stream = Stream(model, tokens)
        self._dense = []
        for batch in self.stream.batches:
            for logits in self._logits(batch, model.blocks):
                dense, negentropy = probabilities(logits)
                self._dense.append((dense.cpu(), negentropy))

    def of(self, block: Block) -> float:
        """Divergence of the model as it stands, if nothing before ``block`` has changed.

        Raises:
            InputError: it is not finite.
        """
        total, count, behind = 0.0, 0, self.model.blocks[block.index :]
        logits = (part for batch in self.stream.batches for part in self._logits(batch, behind))
        for (dense, negentropy), found in zip(self._dense, logits, strict=True):
            total += divergence_sum(dense, negentropy, found)
            count += len(found)
        return mean_divergence(total, count, f"block {block.index}")

    def advance(self, block: Block) -> None:
        """Go on to behind ``block``."""
        self.stream.advance(block)

    def _logits(self, batch: slice, blocks: Sequence[Block]) -> Iterator[Tensor]:
        states = self.stream.at(batch)
        for block in blocks:
            states = self.stream.through(block, states)
        for part in parts(self.stream, batch):
            yield said(self.stream, part, states[part.start - batch.start :][: _length(part)])


class Trials:
    """The divergence of many models, each narrowed in one unit, in one pass over the blocks.

    What :func:`measure_losses` finds, for a model that is read block by block: where that runs the
    blocks behind a unit again for each of its sizes, here the states of all of these go on
    together, so that every block is read once. They are kept where the model's states are.
    """

    def __init__(self, model: Model, tokens: Tokens, units: int) -> None:
        self._dense = Stream(model, tokens)
        windows, *rest = self._dense.held.shape
        every = torch.Size((units * len(SHARES) * windows, *rest))
        self._held = self._dense.activations(every, self._dense.held.dtype)  # one trial by another
        self._first: dict[tuple[str, int], int] = {}  # where the states of a trial begin
        self._curves: dict[str, Curve] = {}

    def of_block(
        self,
        block: Block,
        units: Sequence[Unit],
        solutions: Mapping[str, Solution],
        advance: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Narrow the units of a block one by one, and move everything behind it."""
        for first in self._first.values():
            for batch in self._dense.batches:
                states = self._held[self._rows(first, batch)].to(self._dense.model.device)
                self._held[self._rows(first, batch)] = self._dense.through(block, states)
        for unit in units:
            solution = solutions[unit.name]
            self._curves[unit.name] = solution.curve
            for size in measured_sizes(unit, solution.curve):
                first = len(self._first) * len(self._dense.held)
                self._first[unit.name, size] = first
                with narrowed(block, unit, solved(block, solution, size)):
                    for batch in self._dense.batches:
                        states = self._dense.through(block, self._dense.at(batch))
                        self._held[self._rows(first, batch)] = states
            advance(1)
        self._dense.advance(block)

    def losses(self, units: Sequence[Unit]) -> dict[str, Curve]:
        """The loss of every unit at every size, behind the last block."""
        found: dict[str, dict[int, float]] = {unit.name: {unit.size: 0.0} for unit in units}
        totals, count = dict.fromkeys(self._first, 0.0), 0
        for part in (p for batch in self._dense.batches for p in parts(self._dense, batch)):
            dense, negentropy = probabilities(said(self._dense, part, self._dense.at(part)))
            count += len(dense)
            for key, first in self._first.items():
                states = self._held[self._rows(first, part)].to(dense.device)
                totals[key] += divergence_sum(dense, negentropy, said(self._dense, part, states))
        for (name, size), total in totals.items():
            found[name][size] = mean_divergence(total, count, name)
        return {u.name: interpolated(u)(found[u.name], self._curves[u.name]) for u in units}

    def _rows(self, first: int, batch: slice) -> slice:
        """Where a batch of the trial is whose states begin there."""
        return slice(first + batch.start, first + min(batch.stop, len(self._dense.held)))


def parts(stream: Stream, batch: slice) -> list[slice]:
    """Windows of a batch, as many at a time as their logits have room for."""
    rows = rows_at_once(stream.model.module, stream.model.use, stream.tokens)
    last = min(batch.stop, len(stream.tokens))
    return [slice(i, min(i + rows, last)) for i in range(batch.start, last, rows)]


def _length(part: slice) -> int:
    return int(part.stop - part.start)


def probabilities(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Those of the dense model, and Σ p log p of each output."""
    scores = logits.log_softmax(-1)
    dense = scores.exp()
    return dense, torch.linalg.vecdot(dense, scores)


def said(stream: Stream, batch: slice, states: Tensor) -> Tensor:
    """The logits that count of states behind the last block: (outputs, vocabulary), float32."""
    logits, counted = stream.logits(batch, states), stream.counted(batch)
    found = logits.flatten(0, -2) if bool(counted.all()) else logits[counted]
    return found.float()


def divergence_sum(dense: Tensor, negentropy: Tensor, found: Tensor) -> float:
    """Σ KL over outputs, of the dense model's probabilities from these logits."""
    expected = torch.linalg.vecdot(dense.to(found.device), found)
    return float(exact(negentropy - expected + found.logsumexp(-1)).sum())


def mean_divergence(total: float, count: int, where: str) -> float:
    """Per output, never below 0.

    Raises:
        InputError: it is not finite.
    """
    if not math.isfinite(total):
        raise InputError(
            f"{where}: a narrowed model gives NaN or infinite logits; try --dtype float32, or give "
            f"the method larger ridges."
        )
    return max(0.0, total / count)


def interpolated(unit: Unit) -> Callable[[Mapping[int, float], Curve], Curve]:
    """How losses that were not measured follow from those that were."""
    return by_error if isinstance(unit, Matrix) else between


def windows_to_measure(tokens: Tokens, units: int) -> Tokens:
    """As many of the windows as :data:`PASSES` allow, at least two.

    A measurement runs half of the blocks on average. The solutions were fitted to these windows
    too, so losses are too small where there is little text.
    """
    count = math.ceil(2 * PASSES * len(tokens) / (units * len(SHARES)))
    return tokens[: min(len(tokens), max(2, count))]


def measure_losses(
    divergence: Divergence,
    block: Block,
    units: Sequence[Unit],
    solutions: Mapping[str, Solution],
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Curve]:
    """The loss of every unit of a block at every size; leaves the block as it was."""
    losses = {}
    for unit in units:
        solution, found = solutions[unit.name], {unit.size: 0.0}
        for size in measured_sizes(unit, solution.curve):
            with narrowed(block, unit, solved(block, solution, size)):
                found[size] = divergence.of(block)
        losses[unit.name] = interpolated(unit)(found, solution.curve)
        advance(1)
    divergence.advance(block)
    return losses


def solved(block: Block, solution: Solution, size: int) -> Narrowing:
    """What replaces a unit of the block at a size."""
    with block.solving():
        return solution.at(size)


def measured_sizes(unit: Unit, curve: Curve) -> list[int]:
    """The sizes nearest to :data:`SHARES` of today's, without today's.

    Of a matrix the forms of the largest error, of a tenth and of a hundredth of it, or nearly so.
    """
    allowed = unit.sizes()[:-1]
    if isinstance(unit, Matrix):
        errors = {size: max(curve.at(size), 1e-12) for size in allowed}
        worst = max(errors.values())
        marks = [math.log(worst) - step * math.log(10) for step in range(len(SHARES))]
        return sorted({min(allowed, key=lambda s: abs(math.log(errors[s]) - m)) for m in marks})
    return sorted({min(allowed, key=lambda s: abs(s - share * unit.size)) for share in SHARES})


def between(measured: Mapping[int, float], curve: Curve) -> Curve:
    """Losses at all sizes from measured ones at some, the smallest and today's among them.

    Between two measured sizes log loss is linear in log error of the unit's own curve; above the
    largest of them it is proportional to that error, as a divergence is to a small squared change.
    """
    sizes = sorted(measured)
    values, floor = {}, 0.0
    for size in reversed(sizes):  # a larger size is never taken for worse
        floor = values[size] = max(measured[size], floor)
    losses = [values[sizes[0]]] * len(curve.errors)  # below the first no unit may go
    for low, high in pairwise(sizes):
        a, b = values[low], values[high]
        x, y = curve.at(low), curve.at(high)
        for size in range(low, high + 1):
            if b == 0:  # today's size, or one as good
                share = curve.at(size) / x if x > 0 else (high - size) / (high - low)
                losses[size] = a * share
            else:
                rest = high - size
                along = rest / (high - low) if not x > y > 0 else _position(curve.at(size), x, y)
                losses[size] = b * (a / b) ** along
    return Curve(tuple(losses))


def by_error(measured: Mapping[int, float], curve: Curve) -> Curve:
    """Losses of all forms of a matrix from measured ones of some, its dense weight among them.

    Forms of different kinds are no sizes of one thing: what they lose goes by their error alone.
    Between two measured errors log loss is linear in log error, beyond them proportional to it.
    """
    points, floor = [], 0.0
    for size in sorted(measured, key=curve.at):  # a larger error is never taken for better
        if curve.at(size) > 0:
            floor = max(measured[size], floor)
            points.append((curve.at(size), floor))

    def loss(error: float) -> float:
        if error <= 0 or not points:
            return 0.0
        low = max((p for p in points if p[0] <= error), default=points[0])
        high = min((p for p in points if p[0] >= error), default=points[-1])
        if low[0] >= high[0] or low[1] <= 0:
            return high[1] * error / high[0]
        along = math.log(error / low[0]) / math.log(high[0] / low[0])
        return float(low[1] * (high[1] / low[1]) ** along)

    return Curve(tuple(map(loss, curve.errors)))


def _position(error: float, high: float, low: float) -> float:
    """Where an error lies between two others, 0 at the low one, on a scale of logarithms."""
    return min(1.0, max(0.0, math.log(max(error, low) / low) / math.log(high / low)))
