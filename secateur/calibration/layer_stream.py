"""Windows on their way through a model: hidden states, one block at a time."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.calibration.activation_buffer import Activations
from secateur.data.tokens import Tokens
from secateur.distributed.collectives import ALONE, Ranks
from secateur.models.block import Block, as_output
from secateur.models.model import Model

TOKENS_PER_BATCH = 4096
BATCHES = 4  # at least, of windows that several processes may share


@dataclass
class _Call:
    """Everything but the hidden states that the model passes to one block."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Stream:
    """The hidden states of all windows before some block, in batches; made before the first.

    The states are kept on the CPU, in the dtype that the model computes in: windows × length ×
    hidden numbers; on disk where they are many and the model is read from there block by block. The
    other arguments of a block (masks, rotary tables) depend on the shape of a batch alone, as
    padding stands behind every real token of a causal model, and others get none.

    Where a decoder stands behind an encoder, the positions of both stand side by side. A block sees
    and changes its :meth:`part` of them, and reads the other as the states have it.

    On several ``ranks`` it has a share of the windows; where there is none left, one without a
    token that counts.
    """

    def __init__(
        self, model: Model, tokens: Tokens, rows: int | None = None, ranks: Ranks | None = None
    ) -> None:
        self.model = model
        most = max(1, TOKENS_PER_BATCH // tokens.length)
        if ranks is not None:  # the same batches, however many there are
            most = min(most, math.ceil(len(tokens) / BATCHES))
        self.rows = rows or most
        self.ranks = ranks or ALONE
        share = self.ranks.share(len(tokens), self.rows)
        self._first, self._ahead = share.start, tokens.mask[: share.start]
        self._idle = share.start >= share.stop
        self.tokens = tokens = tokens[:1] if self._idle else tokens[share]
        self.batches = [slice(i, i + self.rows) for i in range(0, len(tokens), self.rows)]
        self._calls: dict[int, list[_Call]] = {}
        self._parts: dict[str, slice] = {}
        held: Activations | None = None
        for batch in self.batches:
            given = tokens[batch].to(model.device)
            with _noted(model.blocks) as seen:
                model.module.base_model(**model.use.inputs(given))
            found = torch.cat([*seen.states.values()], 1)
            if held is None:
                held = self.activations(torch.Size((len(tokens), *found.shape[1:])), found.dtype)
                ends = accumulate((s.shape[1] for s in seen.states.values()), initial=0)
                parts = [slice(start, end) for start, end in pairwise(ends)]
                self._parts = dict(zip(seen.states, parts, strict=True))
            held[batch] = found
            self._calls[len(given)] = seen.calls
        assert held is not None
        self.held = held

    def activations(self, shape: torch.Size, dtype: torch.dtype) -> Activations:
        """Room for numbers of every token, where those of this model belong."""
        home = self.model.offload
        return Activations(shape, dtype, None if home is None else home.folder)

    @property
    def states(self) -> Tensor:
        """All states at once."""
        return self.held[:]

    def part(self, block: Block) -> slice:
        """The positions that a block sees."""
        return self._parts[block.anatomy.blocks]

    def mask(self, batch: slice, block: Block) -> Tensor:
        """Which tokens of a batch that a block sees are real, on the model's device."""
        real = self.tokens.mask[batch, self.part(block)].to(self.model.device)
        return torch.zeros_like(real) if self._idle else real

    def ahead(self, block: Block) -> int:
        """How many tokens that a block sees other ranks have seen before this one."""
        return int(self._ahead[:, self.part(block)].sum())

    def counted(self, batch: slice) -> Tensor:
        """Which outputs of a batch count, on the model's device."""
        return self.model.use.counted(self.tokens[batch].to(self.model.device))

    def at(self, batch: slice) -> Tensor:
        """The states of a batch, on the model's device."""
        return self.held[batch].to(self.model.device)

    def put(self, batch: slice, states: Tensor) -> None:
        """Move a batch on."""
        self.held[batch] = states

    def save(self, path: Path) -> None:
        """Write the states of its windows to a file with those of all; see :meth:`load`."""
        if not self._idle:
            self.held.save(path, self._first if self.ranks.world_size > 1 else None)

    def load(self, path: Path) -> None:
        """Take the states that were saved there, by however many processes."""
        if not self._idle:
            self.held.load(path, self._first)

    def copy(self) -> "Stream":
        """Another stream at the same place."""
        other = object.__new__(Stream)
        other.__dict__ = {**self.__dict__, "held": self.held.copy(self.rows)}
        return other

    def back_to(self, other: "Stream") -> None:
        """Take the states of another stream of the same windows."""
        self.held.take(other.held, self.rows)

    def through(
        self, block: Block, states: Tensor, forward: Callable[..., Any] | None = None
    ) -> Tensor:
        """What a block makes of the states of a batch, or what ``forward`` does in its place."""
        call = self._calls[len(states)][block.index]
        crossing, part = block.anatomy.crossing, self.part(block)
        args, kwargs = (states[:, part], *call.args), call.kwargs
        if crossing is not None:
            norm = self.model.module.base_model.get_submodule(crossing.norm)
            bound = signature(block.module.forward).bind(*args, **kwargs)
            bound.arguments[crossing.argument] = norm(states[:, : part.start])
            args, kwargs = bound.args, bound.kwargs
        output = (forward or block.module)(*args, **kwargs)
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        if len(self._parts) == 1:
            return hidden
        return torch.cat((states[:, : part.start], hidden, states[:, part.stop :]), 1)

    @torch.no_grad()
    def advance(self, block: Block) -> None:
        """Move all batches on to behind a block."""
        for batch in self.batches:
            self.put(batch, self.through(block, self.at(batch)))

    def logits(self, batch: slice, states: Tensor) -> Tensor:
        """What the model's head makes of the states of a batch behind the last block."""
        parts = {name: states[:, part] for name, part in self._parts.items()}
        with _bypassed(self.model.blocks, parts):
            module, given = self.model.module, self.tokens[batch].to(self.model.device)
            logits: Tensor = module(**self.model.use.inputs(given)).logits
        return logits


@dataclass
class _Seen:
    """What the blocks of a model were called with, and by the path of their stack the states.

    ``beside`` holds what the blocks of a stack give beside these.
    """

    states: dict[str, Tensor]
    beside: dict[str, tuple[Any, ...]]
    calls: list[_Call]


@contextmanager
def _noted(blocks: Sequence[Block]) -> Iterator[_Seen]:
    """Let a forward pass skip all blocks, and note what each would have been called with.

    Where the first block of a stack makes something for the others, it does run.
    """
    seen = _Seen({}, {}, [])

    def noting(block: Block) -> Callable[..., Any]:
        name, forward = block.anatomy.blocks, block.module.forward

        def note(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.states[name] = hidden_states
            seen.calls.append(_Call(args, kwargs))
            if block.anatomy.position_bias and name not in seen.beside:
                seen.beside[name] = forward(hidden_states, *args, **kwargs)[1:]
            return as_output(hidden_states, block.anatomy, seen.beside.get(name))

        return note

    with _replaced(blocks, noting):
        yield seen


@contextmanager
def _bypassed(blocks: Sequence[Block], states: dict[str, Tensor]) -> Iterator[None]:
    """Let a forward pass skip all blocks, and have these states behind them, by stack."""

    def giving(block: Block) -> Callable[..., Any]:
        return lambda *_, **__: as_output(states[block.anatomy.blocks], block.anatomy)

    with _replaced(blocks, giving):
        yield


@contextmanager
def _replaced(blocks: Sequence[Block], by: Callable[[Block], Callable[..., Any]]) -> Iterator[None]:
    """Give every block another forward for a while."""
    gone = [block.module.__dict__.get("forward") for block in blocks]
    made = [by(block) for block in blocks]
    try:
        for block, forward in zip(blocks, made, strict=True):
            block.module.forward = forward
        yield
    finally:
        for block, own in zip(blocks, gone, strict=True):
            del block.module.forward
            if own is not None:
                block.module.forward = own
