"""What a model says of many windows, in batches: through it whole, or block by block."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from secateur.calibration.layer_stream import Stream
from secateur.data.tasks import Use
from secateur.data.tokens import Tokens
from secateur.models.model import Model

TOKENS_PER_BATCH = 4096
LOGITS_PER_BATCH = 2**25  # 128 MB of them in float32, if a window is no longer

Batches = Iterator[tuple[Tokens, Tensor]]


def rows_at_once(module: Any, use: Use, tokens: Tokens) -> int:
    """How many rows go through the model together, so that their logits take bounded room."""
    vocabulary = module.get_input_embeddings().weight.shape[0] if use.reads_text else 1
    batch = min(TOKENS_PER_BATCH, LOGITS_PER_BATCH // vocabulary)
    return max(1, batch // tokens.length)


def batches(
    model: Model, tokens: Tokens, advance: Callable[[int], None] = lambda _: None
) -> Batches:
    """Some rows of the tokens at a time, on the model's device, and the logits of each.

    A model that is read block by block is gone through once for all of them. ``advance`` is told
    how many rows are done.
    """
    if model.offload is None:
        yield from whole_batches(model.module, model.use, tokens, advance)
    else:
        yield from _streamed(model, tokens, advance)


def whole_batches(
    module: Any, use: Use, tokens: Tokens, advance: Callable[[int], None] = lambda _: None
) -> Batches:
    """The same of a transformers model in memory."""
    rows = rows_at_once(module, use, tokens)
    for start in range(0, len(tokens), rows):
        given = tokens[start : start + rows].to(module.device)
        with torch.inference_mode():
            logits = module(**use.inputs(given)).logits
        yield given, logits
        advance(len(given))


def last_logits(
    model: Model, tokens: Tokens, advance: Callable[[int], None] = lambda _: None
) -> Tensor:
    """What comes behind each row, in float64 on the CPU, of a model that is read block by block."""
    found = [logits[:, 0].cpu().double() for _, logits in _streamed(model, tokens, advance, -1)]
    return torch.cat(found)


def _streamed(
    model: Model, tokens: Tokens, advance: Callable[[int], None], first: int = 0
) -> Batches:
    done, passes = 0, len(model.blocks) + 1

    def reach(rows: int) -> None:
        nonlocal done
        advance(rows - done)
        done = rows

    with torch.no_grad():
        stream = Stream(model, tokens, rows_at_once(model.module, model.use, tokens))
        for number, block in enumerate(model.in_turn(), 1):
            stream.advance(block)
            reach(len(tokens) * number // passes)
    with model.headed():
        for batch in stream.batches:
            with torch.no_grad():
                logits = stream.logits(batch, stream.at(batch)[:, first:])
            yield tokens[batch].to(model.device), logits
    reach(len(tokens))
