"""Models that lack blocks, and how tests make and look at them."""

import pytest
import torch

from secateur import Store, calibrate
from secateur.calibration.layer_stream import Stream
from secateur.data.tokens import Tokens
from secateur.structure.costs import Prices
from secateur.structure.units import WholeBlock
from tests.contract.conftest import logits
from tests.support.families import CAUSAL, FAMILIES, WHOLE, read, stream

IDS = stream(24, seed=3).unsqueeze(0)
#: those of which each has something that others have not
QUICK = (
    *("llama", "qwen2", "gemma2", "opt_norm_after", "gpt2_scaled", "gpt_neox", "falcon"),
    *("bert", "vit"),
)
every_family = pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in FAMILIES
        if name not in WHOLE
    ],
)


def padded(count=6, length=32):
    """Windows of which some end early."""
    ids, mask = stream(count * length, seed=7).view(count, length), torch.ones(count, length).bool()
    mask[0, 20:] = mask[3, 9:] = False
    return Tokens(torch.where(mask, ids, 0), mask)


def given_to(name):
    """What a variant is asked, and what it is calibrated on: padded where it is causal."""
    if name in CAUSAL:
        return IDS, padded()
    return read(name, 1, 24, 3), read(name, 6, 32, 7)


def measure(model, method, tokens=None):
    tokens, store = tokens or padded(), Store()
    calibrate(model, tokens, method.needs, store)
    return tokens, store


def gone(model, *indices):
    """Sizes of all blocks."""
    return {f"layers.{i}.block": int(i not in indices) for i in range(len(model.blocks))}


def bypassed(model, constants, asked=IDS):
    """The dense model's logits while blocks hand on what they get, and a constant."""
    handles = []
    for index, constant in constants.items():

        def instead(_, args, kwargs, output, constant=constant):
            states = (args[0] if args else kwargs["hidden_states"]) + constant
            return (states, *output[1:]) if isinstance(output, tuple) else states

        module = model.blocks[index].module
        handles.append(module.register_forward_hook(instead, with_kwargs=True))
    found = logits(model.module, asked)
    for handle in handles:
        handle.remove()
    return found


def changes(model, tokens):
    """Input and output of every block over the real tokens, (tokens, hidden)."""
    walking, found = Stream(model, tokens), []
    for block in model.blocks:
        before = walking.states.clone()
        walking.advance(block)
        found.append((before[tokens.mask].double(), walking.states[tokens.mask].double()))
    return found


def units_of(prices):
    """Blocks, and their prices."""
    units = [
        WholeBlock(f"layers.{i}.block", block=i, size=1, step=1, hidden=8, parts=())
        for i in range(len(prices))
    ]
    table = {unit.name: {0: 0, 1: price} for unit, price in zip(units, prices, strict=True)}
    return units, Prices("parameters", table)


def axis(block, kind):
    """What reads an axis of a block, by the axis's kind."""
    return (block.mlp if kind == "mlp" else block.attention).axis(kind)
