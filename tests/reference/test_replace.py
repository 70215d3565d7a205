"""Blocks that leave a constant: the best one, folded into what stands before."""

import pytest
import torch

from secateur.apply import narrowed
from secateur.methods.replace import Replace
from secateur.propagate import narrow_blocks
from secateur.units import DEPTH
from tests.contract.conftest import logits, spread
from tests.reference.blocks import IDS, bypassed, changes, every_family, gone, measure, padded


def test_the_constant_is_the_best_one_and_the_error_is_what_it_leaves(opened):
    model, method, tokens = opened("llama", "float64"), Replace(), padded()
    _, store = measure(model, method, tokens)
    for block, (x, y) in zip(model.blocks, changes(model, tokens), strict=True):
        (unit,) = block.units(1, DEPTH, True)
        solution = method.solve(unit, block, store.get(block.index, method.needs))
        bias = solution.at(0).bias
        assert bias is not None

        def left(constant, x=x, y=y):
            return float((y - x - constant).square().sum() / y.square().sum())

        assert solution.curve.at(0) == pytest.approx(left(bias), rel=1e-9)
        assert solution.curve.at(1) == 0
        if block.index:
            for seed in range(4):
                torch.manual_seed(seed)
                assert left(bias) < left(bias + 1e-3 * torch.randn_like(bias))


@every_family
@pytest.mark.parametrize("indices", [(1, 2), (2,)])
def test_a_folded_constant_is_one_added_to_the_stream(opened, name, indices):
    """Behind a block that stays; blocks without one before them leave nothing."""
    model, method, tokens = opened(name, "float64"), Replace(), padded()
    _, store = measure(model, method, tokens)
    sizes, constants = gone(model, *indices), {}
    for block in model.blocks:
        solution = method.solve(
            block.units(1, DEPTH, True)[0], block, store.get(block.index, method.needs)
        )
        if block.index in indices:
            bias = solution.at(0).bias
            # where norms stand behind sums a bias of the MLP does not reach the stream
            assert (bias is not None) == (block.index > 0 and block.sums)
            constants[block.index] = 0.0 if bias is None or 0 in indices else bias
    expected = bypassed(model, constants)
    units = method.units(model, 8)
    for _ in narrow_blocks(model, method, units, sizes, tokens, store):
        pass
    assert spread(logits(model.module, IDS), expected) < 1e-9
    if any(isinstance(value, torch.Tensor) for value in constants.values()):
        plain = bypassed(opened(name, "float64"), dict.fromkeys(indices, 0.0))
        assert spread(plain, expected) > 1e-3


def test_a_measured_loss_counts_the_constant(opened):
    model, method, tokens = opened("llama", "float64"), Replace(), padded()
    _, store = measure(model, method, tokens)
    block = model.blocks[1]
    (unit,) = block.units(1, DEPTH, True)
    narrowing = method.solve(unit, block, store.get(1, method.needs)).at(0)
    expected, before = bypassed(model, {1: narrowing.bias}), logits(model.module, IDS)
    with narrowed(block, unit, narrowing):
        assert block.gone
        assert spread(logits(model.module, IDS), expected) < 1e-12
    assert not block.gone
    assert torch.equal(logits(model.module, IDS), before)
