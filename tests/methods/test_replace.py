"""Blocks that leave a constant: the best one, folded into what stands before."""

import pytest
import torch

from secateur import InputError, Store
from secateur.apply.sequential import narrow_blocks
from secateur.apply.surgery import narrowed
from secateur.calibration.needs import Needs
from secateur.calibration.statistics import Change
from secateur.methods.replace import Replace
from secateur.structure.units import DEPTH
from tests.contract.conftest import logits, spread
from tests.support.blocks import (
    IDS,
    bypassed,
    changes,
    every_family,
    given_to,
    gone,
    measure,
    padded,
)


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
    model, method, (asked, tokens) = opened(name, "float64"), Replace(), given_to(name)
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
    expected = bypassed(model, constants, asked)
    units = method.units(model, 8)
    for _ in narrow_blocks(model, method, units, sizes, tokens, store):
        pass
    assert spread(logits(model.module, asked), expected) < 1e-9
    if any(isinstance(value, torch.Tensor) for value in constants.values()):
        plain = bypassed(opened(name, "float64"), dict.fromkeys(indices, 0.0), asked)
        assert spread(plain, expected) > 1e-3


@pytest.mark.parametrize("name", ["bert", "gemma2", "opt_norm_after", "llama"])
def test_the_first_block_stays_only_for_constants(opened, name):
    """The mistake: to keep it where no block behind it leaves one."""
    model, (asked, tokens) = opened(name, "float64"), given_to(name)
    stays = name == "llama"
    assert [unit.least for unit in Replace().units(model, 1)] == [int(stays), 0, 0]
    assert not any(unit.least for unit in Replace(compensate=0).units(model, 1))
    if not stays:
        method, expected = Replace(), bypassed(model, {0: 0.0, 1: 0.0}, asked)
        _, store = measure(model, method, tokens)
        units = method.units(model, 8)
        list(narrow_blocks(model, method, units, gone(model, 0, 1), tokens, store))
        assert spread(logits(model.module, asked), expected) < 1e-9


@pytest.fixture
def folded(opened):
    """The bias of the first MLP, 1 before, behind which two blocks go that each add a constant."""

    def fold(added):
        model, method = opened("gpt2", "bfloat16"), Replace()
        bias = model.blocks[0].mlp.consumer.bias
        bias.fill_(1.0)
        change = torch.full((len(bias) + 2,), added, dtype=torch.float64)
        store = Store()
        for block in model.blocks:
            store.put(block.index, {Needs.CHANGE: Change(change, 1)})
        for _ in narrow_blocks(
            model, method, method.units(model, 1), gone(model, 1, 2), padded(), store
        ):
            pass
        return model.blocks[0].mlp.consumer.bias

    return fold


def test_constants_of_several_blocks_are_rounded_once(folded):
    """The mistake: each is rounded into the bias by itself, where both are below its last digit."""
    small = 0.0035  # of 2⁻⁷, the distance to the next number, less than half
    assert torch.tensor(1 + small).bfloat16() == 1
    assert set(folded(small).tolist()) == {1 + 2**-7}


def test_a_constant_beyond_the_number_format_is_refused(folded):
    with pytest.raises(InputError, match=r"block 0.*bfloat16.*--compensate 0"):
        folded(1e39)


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
