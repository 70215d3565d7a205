"""Windows on their way through a model: hidden states, one block at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.block import Block
from secateur.model import Model
from secateur.text import Tokens

TOKENS_PER_BATCH = 4096


@dataclass
class _Call:
    """Everything but the hidden states that the model passes to one block."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Stream:
    """The hidden states of all windows before some block, in batches; made before the first.

    The states are kept on the CPU, in the dtype that the model computes in: windows × length ×
    hidden numbers. The other arguments of a block (masks, rotary tables) depend on the shape of a
    batch alone, as padding stands behind every real token of a causal model, and others get none.
    """

    def __init__(self, model: Model, tokens: Tokens, rows: int | None = None) -> None:
        self.model = model
        self.tokens = tokens
        rows = rows or max(1, TOKENS_PER_BATCH // tokens.length)
        self.batches = [slice(i, i + rows) for i in range(0, len(tokens), rows)]
        self._calls: dict[int, list[_Call]] = {}
        states: Tensor | None = None
        for batch in self.batches:
            given = tokens[batch].to(model.device)
            with _blocks_bypassed(model.blocks) as seen:
                model.module.base_model(**model.use.inputs(given))
            if states is None:
                states = seen.states.new_empty(len(tokens), *seen.states.shape[1:]).cpu()
            states[batch] = seen.states.cpu()
            self._calls[len(given)] = seen.calls
        assert states is not None
        self.states = states

    def mask(self, batch: slice) -> Tensor:
        """Which tokens of a batch are real, on the model's device."""
        return self.tokens.mask[batch].to(self.model.device)

    def counted(self, batch: slice) -> Tensor:
        """Which outputs of a batch count, on the model's device."""
        return self.model.use.counted(self.tokens[batch].to(self.model.device))

    def at(self, batch: slice) -> Tensor:
        """The states of a batch, on the model's device."""
        return self.states[batch].to(self.model.device)

    def put(self, batch: slice, states: Tensor) -> None:
        """Move a batch on."""
        self.states[batch] = states.to(self.states.device)

    def copy(self) -> "Stream":
        """Another stream at the same place."""
        other = object.__new__(Stream)
        other.__dict__ = {**self.__dict__, "states": self.states.clone()}
        return other

    def through(
        self, block: Block, states: Tensor, forward: Callable[..., Any] | None = None
    ) -> Tensor:
        """What a block makes of the states of a batch, or what ``forward`` does in its place."""
        call = self._calls[len(states)][block.index]
        output = (forward or block.module)(states, *call.args, **call.kwargs)
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden

    @torch.no_grad()
    def advance(self, block: Block) -> None:
        """Move all batches on to behind a block."""
        for batch in self.batches:
            self.put(batch, self.through(block, self.at(batch)))

    def logits(self, batch: slice, states: Tensor) -> Tensor:
        """What the model's head makes of the states of a batch behind the last block."""
        with _blocks_bypassed(self.model.blocks, states):
            module, given = self.model.module, self.tokens[batch].to(self.model.device)
            logits: Tensor = module(**self.model.use.inputs(given)).logits
        return logits


class _Seen:
    states: Tensor
    calls: list[_Call]


@contextmanager
def _blocks_bypassed(blocks: Sequence[Block], states: Tensor | None = None) -> Iterator[_Seen]:
    """Let a forward pass skip all blocks, and note what each would have been called with.

    ``states`` takes the place of the hidden states.
    """
    seen = _Seen()
    seen.calls = []

    def note(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.states = hidden_states
        seen.calls.append(_Call(args, kwargs))
        given = hidden_states if states is None else states
        return (given, None) if blocks[0].anatomy.in_tuple else given

    gone = [block.module.__dict__.get("forward") for block in blocks]
    try:
        for block in blocks:
            block.module.forward = note
        yield seen
    finally:
        for block, own in zip(blocks, gone, strict=True):
            del block.module.forward
            if own is not None:
                block.module.forward = own
