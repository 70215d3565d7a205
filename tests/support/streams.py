"""Windows of tokens, and what passes through a block."""

import torch

from secateur.apply.sequential import watched
from secateur.calibration.layer_stream import Stream
from secateur.data.tokens import Tokens
from tests.support.families import stream


def windows(count=24, length=30, seed=0):
    ids = stream(count * length, seed).view(count, length)
    return Tokens(ids, torch.ones_like(ids, dtype=torch.bool))


def look(model, tokens, block, before):
    """What passes through a block, and what comes out of it."""
    with torch.no_grad(), watched(block) as seen:
        after = Stream(model, tokens).through(block, before)
    return seen, after
