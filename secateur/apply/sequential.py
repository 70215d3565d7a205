"""Blocks narrowed one after the other, each to make good what those before it have lost."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from secateur.apply.block_journal import States
from secateur.apply.narrowing_messages import broadcast_narrowing
from secateur.apply.residual_slicing import sliced_blocks
from secateur.apply.surgery import (
    check_finite,
    narrow_block,
    narrow_unit,
    note_kept,
    solved,
)
from secateur.calibration.collect import Store, collect
from secateur.calibration.layer_stream import Stream
from secateur.calibration.needs import BlockStatistics, Needs
from secateur.calibration.statistics import Cross, Gram, wide
from secateur.calibration.summation import add_up
from secateur.calibration.token_batches import Piece, TokenBatches
from secateur.data.tokens import Tokens
from secateur.distributed.collectives import ALONE, Ranks
from secateur.methods.base import Method, SequentialMethod
from secateur.models.block import Block
from secateur.models.model import Model
from secateur.structure.narrowing import Narrowing
from secateur.structure.units import EVERY_BLOCK, Unit, WholeBlock
from secateur.utils.precision import exact

ADDITIVE = 0.02  # of what a block adds; and this many roundings of its output, in half precision
ROUNDINGS = 2


def narrow_blocks(
    model: Model,
    method: Method,
    units: Sequence[Unit],
    sizes: Mapping[str, int],
    tokens: Tokens,
    store: Store,
    journal: States | None = None,
    ranks: Ranks = ALONE,
    kept: dict[str, Tensor] | None = None,
) -> Iterator[Block]:
    """Bring every block to its sizes, one after the other; each is given out when it is done.

    Where blocks behind it go, a block takes the constants that stand for them. Blocks that the
    ``journal`` knows are only brought to their shapes, and not given out. On several
    ``ranks`` all have every block in the end. Units that are named in ``kept`` keep these
    coordinates; what the method chooses for others is added there.
    """
    kept = {} if kept is None else kept
    for unit in units:
        if unit.block == EVERY_BLOCK and sizes[unit.name] < unit.size:
            yield from sliced_blocks(model, method, unit, sizes[unit.name], tokens)
            return
    line: Propagation | None = None
    if isinstance(method, SequentialMethod):
        line = Propagation(model, tokens, method, ranks, kept=kept)
    stream = Stream(model, tokens, ranks=ranks) if method.rereads else None
    done = 0 if journal is None else journal.done
    if journal is not None:
        moved = any(sizes[u.name] < u.size for u in units if u.block < done)
        _go_on(model, journal, line, stream, moved=moved)
    for block in model.in_turn(model.blocks[done:]):
        own = [unit for unit in units if unit.block == block.index]
        if _goes(block, sizes):
            block.remove()  # its constant is in a block before it
            yield block
            continue
        if stream is not None:
            with torch.no_grad():
                statistics = collect(stream, block, method.needs, move=False)
        elif line is None or ranks.leader:
            statistics = store.get(block.index, method.needs, model.exact_device)
        else:
            statistics = {}  # what is solved there comes from the first one
        if line is None:
            narrow_block(block, own, sizes, method, statistics, ranks=ranks, kept=kept)
        else:
            line.narrow_block(block, own, sizes, statistics)
        behind = takewhile(lambda b: _goes(b, sizes), model.blocks[block.index + 1 :])
        found = [_constant(model, method, units, later, store) for later in behind]
        statistics = {}  # gone before those of the next are read
        if constants := [exact(constant) for constant in found if constant is not None]:
            block.add_constant(torch.stack(constants).sum(0))  # all at once, to round only once
        if stream is not None:
            stream.advance(block)
        yield block


def _go_on(
    model: Model,
    journal: States,
    line: "Propagation | None",
    stream: Stream | None,
    *,
    moved: bool,
) -> None:
    """Bring finished blocks to their shapes, and what runs through the blocks behind them."""
    for block in model.blocks[: journal.done]:
        if line is not None:
            with model.resident(block):
                line.dense.advance(block)
        journal.restore(model, block)
    if line is not None:
        line.moved = moved
        journal.attach("narrow", line.narrow)
    if stream is not None:
        journal.attach("reread", stream)


def _constant(
    model: Model, method: Method, units: Sequence[Unit], gone: Block, store: Store
) -> Tensor | None:
    """What stands for a block that goes."""
    (unit,) = (u for u in units if u.block == gone.index and isinstance(u, WholeBlock))
    statistics = store.get(gone.index, method.needs, model.exact_device)
    with model.resident(gone), gone.solving():
        return method.solve(unit, gone, statistics).at(0).bias


def _goes(block: Block, sizes: Mapping[str, int]) -> bool:
    return sizes.get(f"layers.{block.index}.block") == 0


class Propagation:
    """The dense and the narrowed model side by side, before the block that is next.

    A consumer's target is what brings the narrowed stream back to the dense one,

        t_attention = x + attention(x) − x̂,   t_mlp = y − x̂ − attention(x̂)

    for a block y = x + attention + mlp, whether one reads the other's output or not; x̂ is the
    narrowed model's stream. What a decoder's block adds between the two, of the encoder's output,
    is taken from the MLP's target, too, as the narrowed model has it. In a block of another form
    the targets are the dense outputs themselves: a norm behind a consumer, or behind the sum, takes
    back what would be added to make up for x̂, and scales a block's outputs by what no least
    squares knows.

    Four numbers a token and hidden dim are kept: two streams, the targets and the MLP's inputs. On
    several ``ranks`` each keeps those of its windows, and what the first one solves is for all.
    """

    def __init__(
        self,
        model: Model,
        tokens: Tokens,
        method: SequentialMethod,
        ranks: Ranks = ALONE,
        kept: dict[str, Tensor] | None = None,
    ) -> None:
        self.method = method
        self.kept = {} if kept is None else kept
        self.ranks = ranks
        with torch.no_grad():
            self.dense = Stream(model, tokens, ranks=ranks)
        self.narrow = self.dense.copy()
        held = self.dense.held
        self.targets = self.dense.activations(
            held.shape, wide(torch.empty(0, dtype=held.dtype)).dtype
        )
        self.inputs = self.dense.activations(held.shape, held.dtype)
        self.moved = False

    @torch.no_grad()
    def narrow_block(
        self,
        block: Block,
        units: list[Unit],
        sizes: Mapping[str, int],
        statistics: BlockStatistics,
    ) -> None:
        """Bring the units of a block to their sizes, and every consumer to its target."""
        if not block.one_of_each:
            self._narrow_alone(block, units, sizes, statistics)
            return
        own = {unit.kind: unit for unit in units}
        self.moved = self.moved or any(sizes[unit.name] < unit.size for unit in units)
        additive = self._run_dense(block)
        if not self.moved:
            self.narrow.back_to(self.dense)
            return
        query_key, value_output, mlp = own.get("query_key"), own["value_output"], own["mlp"]
        if query_key is not None and sizes[query_key.name] < query_key.size:
            self._apply(block, query_key, sizes, statistics)
        whole = sizes[value_output.name] == value_output.size
        mixed = self._mixed(block, additive, whole)
        self._apply(block, value_output, sizes, {**statistics, **mixed})
        self._apply(block, mlp, sizes, {**statistics, **self._hidden(block, additive)})
        if sizes[mlp.name] > 0:
            self.method.refine(block, self._rows(block))
            self.ranks.broadcast_tensors(parameter.data for parameter in block.module.parameters())
        check_finite(block)
        self.narrow.advance(block)

    def _narrow_alone(
        self,
        block: Block,
        units: list[Unit],
        sizes: Mapping[str, int],
        statistics: BlockStatistics,
    ) -> None:
        """Bring a block of other parts to its sizes by the dense model's statistics.

        The targets above are defined for one attention and one MLP behind it.
        """
        self.moved = self.moved or any(sizes[unit.name] < unit.size for unit in units)
        self.dense.advance(block)
        given = (block, units, sizes, self.method, statistics)
        narrow_block(*given, ranks=self.ranks, kept=self.kept)
        self.narrow.advance(block)

    def _rows(self, block: Block) -> TokenBatches:
        """What the MLP reads and should give on all real tokens, on the model's device."""
        part, device = self.dense.part(block), self.dense.model.device

        def pieces() -> Iterator[Piece]:
            for batch in self.dense.batches:
                mask = self.dense.mask(batch, block)
                inputs, targets = (
                    held[batch][:, part].to(device)[mask] for held in (self.inputs, self.targets)
                )
                yield inputs, targets

        return TokenBatches(pieces, self.dense.ahead(block), self.ranks)

    def _apply(
        self, block: Block, unit: Unit, sizes: Mapping[str, int], statistics: BlockStatistics
    ) -> None:
        size = sizes[unit.name]

        def solve() -> Narrowing:
            with block.solving():
                return solved(self.method, unit, block, statistics, size=size, kept=self.kept)

        narrowing = broadcast_narrowing(solve, self.ranks)
        narrow_unit(block, unit, narrowing)
        if size < unit.size:
            note_kept(self.kept, self.method, unit, narrowing)

    def _run_dense(self, block: Block) -> bool:
        """Move the dense stream on, note the targets, and say whether the block is a plain sum."""
        additive: bool | None = None
        part = self.dense.part(block)
        for batch in self.dense.batches:
            before = self.dense.at(batch)
            with watched(block) as seen:
                after = self.dense.through(block, before)
            attention = wide(seen.attention)  # differences of large streams need the digits
            if additive is None:
                added = seen.before_mlp + wide(seen.mlp)
                own = block.sums and _adds_up(before[:, part], added, after[:, part])
                additive = self.ranks.agree(bool(own))  # all targets are of one kind
            target = wide(before[:, part]) + attention if additive else attention
            self.targets.put(batch, part, target)
            self.inputs.put(batch, part, seen.mlp)  # until the narrowed model's inputs are known
            self.dense.put(batch, after)
        assert additive is not None
        return additive

    def _mixed(self, block: Block, additive: bool, whole: bool) -> BlockStatistics:
        """What the output projection reads in the narrowed model, and what it should make of it.

        Values that stay ``whole`` keep their bias; that of others goes into the output's.
        """
        gram, cross, attention = Gram(), Cross(), block.attention
        bias = attention.module.o_proj.bias if whole else attention.folded_bias()
        part = self.narrow.part(block)
        for batch in self.narrow.batches:
            states, mask = self.narrow.at(batch), self.narrow.mask(batch, block)
            target = self.targets[batch][:, part].to(states.device)
            with watched(block, until=attention.module.o_proj) as seen:
                self.narrow.through(block, states)
            values = seen.mixed if whole else attention.mixed_values(seen.mixed)
            if additive:
                target = target - wide(states[:, part])
            gram.update(values, mask=mask)
            cross.update(values, target if bias is None else target - bias, mask=mask)
        found: BlockStatistics = {Needs.MIXED_GRAM: gram, Needs.MIXED_TARGET: cross}
        add_up(found, self.ranks)
        return found

    def _hidden(self, block: Block, additive: bool) -> BlockStatistics:
        """What the consumer reads in the narrowed model, and what it should make of it."""
        gram, cross, bias = Gram(), Cross(), block.mlp.consumer.bias
        part = self.narrow.part(block)
        for batch in self.narrow.batches:
            states, mask = self.narrow.at(batch), self.narrow.mask(batch, block)
            with watched(block, until=block.mlp.consumer) as seen:
                self.narrow.through(block, states)
            if additive:
                dense = wide(self.dense.at(batch)[:, part])
                target = dense - wide(states[:, part]) - seen.before_mlp
            else:
                target = wide(self.inputs[batch][:, part].to(states.device))
            if isinstance(bias, Tensor):
                target = target - bias
            gram.update(seen.hidden, mask=mask)
            cross.update(seen.hidden, target, mask=mask)
            self.targets.put(batch, part, target)
            self.inputs.put(batch, part, seen.inputs)
        found: BlockStatistics = {Needs.HIDDEN_GRAM: gram, Needs.HIDDEN_TARGET: cross}
        add_up(found, self.ranks)
        return found


def _adds_up(before: Tensor, added: Tensor, after: Tensor) -> bool:
    """Whether a block's output is its input plus what it adds, but for rounding."""
    rest = float((wide(after) - wide(before) - added).norm())
    rounding = ROUNDINGS * torch.finfo(after.dtype).eps * float(wide(after).norm())
    return rest <= ADDITIVE * float(added.norm()) + rounding


class Seen:
    """What passed through a block: (batch, tokens, …)."""

    mixed: Tensor  #: input of the output projection
    attention: Tensor  #: its output
    crossing: Tensor | None = None  #: what is added behind it of another stack
    inputs: Tensor  #: input of the MLP's producers
    hidden: Tensor  #: input of its consumer
    mlp: Tensor  #: its output

    @property
    def before_mlp(self) -> Tensor:
        """All that is added before the MLP, at least in float32."""
        attention = wide(self.attention)
        return attention if self.crossing is None else attention + wide(self.crossing)


class _ReachedError(Exception):
    """The forward pass has come as far as it is needed."""


@contextmanager
def watched(block: Block, until: nn.Module | None = None) -> Iterator[Seen]:
    """Note what passes through a block, whose forward inside ends where ``until`` is reached."""
    seen, shape = Seen(), (0, 0)

    def entering(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal shape
        shape = (args[0] if args else kwargs["hidden_states"]).shape[:2]

    def reading(name: str) -> Callable[[nn.Module, Any], None]:
        def note(module: nn.Module, args: Any) -> None:
            setattr(seen, name, args[0].reshape(*shape, -1))
            if module is until:
                raise _ReachedError

        return note

    def giving(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def note(module: nn.Module, args: Any, output: Tensor) -> None:
            seen_now = output.reshape(*shape, -1)
            setattr(seen, name, seen_now.clone())  # a block may add to it in place

        return note

    mlp, output = block.mlp, block.attention.module.o_proj
    producer, consumer = mlp.producers[0][0], mlp.consumer
    crossing = block.anatomy.crossing
    with ExitStack() as stack:
        if crossing is not None:
            reader = block.module.get_submodule(crossing.output)
            stack.callback(reader.register_forward_hook(giving("crossing")).remove)
        for handle in (
            block.module.register_forward_pre_hook(entering, with_kwargs=True),
            output.register_forward_pre_hook(reading("mixed")),
            output.register_forward_hook(giving("attention")),
            producer.register_forward_pre_hook(reading("inputs")),
            consumer.register_forward_pre_hook(reading("hidden")),
            consumer.register_forward_hook(giving("mlp")),
        ):
            stack.callback(handle.remove)
        stack.enter_context(suppress(_ReachedError))
        yield seen
