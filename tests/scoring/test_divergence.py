"""Measured losses: their divergence against two plain forward passes, and what lies between."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import kl_div

from secateur.allocate.knapsack import Knapsack
from secateur.apply.surgery import narrowed
from secateur.calibration import layer_stream as streams
from secateur.data.tokens import Tokens, sample
from secateur.methods.auto import Auto
from secateur.methods.flap import FLAP
from secateur.methods.modegpt import MoDeGPT
from secateur.models.linear_ops import inputs_by_outputs
from secateur.scoring.divergence import (
    PASSES,
    SHARES,
    Divergence,
    between,
    measure_losses,
    measured_sizes,
    windows_to_measure,
)
from secateur.scoring.evidence import score
from secateur.structure.error_curve import Curve
from secateur.structure.narrowing import Narrowing
from secateur.structure.units import MLP
from tests.support.families import CAUSAL, stream

every_family = pytest.mark.parametrize("name", CAUSAL)
WINDOW = 16


# Between measured sizes


@st.composite
def measured_units(draw):
    """A falling curve with flat parts and zeros, and losses in any order at some sizes."""
    drops = draw(st.lists(st.one_of(st.just(0.0), st.floats(1e-9, 1)), min_size=1, max_size=24))
    dead = draw(st.integers(0, len(drops)))  # that many sizes at the end are without error
    drops = drops[: len(drops) - dead] + [0.0] * dead
    errors = [math.fsum(drops[k:]) for k in range(len(drops) + 1)]
    errors = [min(1.0, error / max(errors[0], 1e-30)) for error in errors]
    sizes = draw(st.sets(st.integers(0, len(drops)))) | {0, len(drops)}
    losses = st.one_of(st.just(0.0), st.floats(1e-9, 20))
    measured = {size: draw(losses) for size in sorted(sizes)} | {len(drops): 0.0}
    return Curve(tuple(errors)), measured


def falling(measured):
    """No size is worse than a smaller one."""
    return {k: max(loss for size, loss in measured.items() if size >= k) for k in measured}


@settings(max_examples=120, deadline=None)
@given(measured_units())
def test_losses_go_through_what_was_measured_and_fall(made):
    curve, measured = made
    found = between(measured, curve).errors
    assert len(found) == len(curve.errors)
    for size, loss in falling(measured).items():
        assert found[size] == pytest.approx(loss, rel=1e-9, abs=1e-300)
    assert all(math.isfinite(loss) and loss >= 0 for loss in found)
    for smaller, larger in pairwise(found):
        assert larger <= smaller * (1 + 1e-9)


@settings(max_examples=120, deadline=None)
@given(measured_units())
def test_above_the_largest_measured_size_a_loss_is_proportional_to_its_error(made):
    """The mistake: a straight line in size, which knows nothing of the unit."""
    curve, measured = made
    low, high = sorted(measured)[-2:]
    found = between(measured, curve)
    for size in range(low, high + 1):
        if curve.at(low) > 0:
            expected = measured[low] * curve.at(size) / curve.at(low)
        else:  # an error of nothing says nothing about the loss
            expected = measured[low] * (high - size) / (high - low)
        assert found.at(size) == pytest.approx(expected, rel=1e-9, abs=1e-300)


@settings(max_examples=120, deadline=None)
@given(measured_units())
def test_between_two_sizes_log_loss_is_linear_in_log_error(made):
    curve, measured = made
    losses, found, sizes = falling(measured), between(measured, curve), sorted(measured)
    for low, high in pairwise(sizes):
        a, b, x, y = losses[low], losses[high], curve.at(low), curve.at(high)
        if b == 0:
            continue
        for size in range(low, high + 1):
            if x > y * (1 + 1e-9) and y > 0:
                along = (math.log(curve.at(size)) - math.log(y)) / (math.log(x) - math.log(y))
            elif x > y > 0:
                continue  # rounding decides
            else:  # a curve that is flat or ends in nothing: in size
                along = (high - size) / (high - low)
            expected = math.log(b) + along * (math.log(a) - math.log(b))
            assert math.log(found.at(size)) == pytest.approx(expected, abs=1e-6)


def test_losses_in_between_by_hand():
    curve = Curve((1.0, 0.5, 0.25, 0.25, 0.0625, 0.01, 0.004, 0.0))
    found = between({0: 16.0, 4: 1.0, 7: 0.0}, curve).errors
    # Loss falls by 16 where error falls by 16, so with the first power of it.
    assert found == pytest.approx((16, 8, 4, 4, 1, 0.16, 0.064, 0))
    squared = between({0: 256.0, 4: 1.0, 7: 0.0}, curve).errors
    assert squared[:5] == pytest.approx((256, 64, 16, 16, 1))
    # A larger size that measures worse lifts the smaller ones.
    assert between({0: 1.0, 4: 2.0, 7: 0.0}, curve).errors[:5] == pytest.approx((2, 2, 2, 2, 2))


def unit_of(size, step, least=0):
    return MLP(
        name="unit",
        block=0,
        size=size,
        step=step,
        hidden=32,
        least=least,
        producers=2,
        biased_producers=0,
    )


@pytest.mark.parametrize(
    "unit",
    [
        unit_of(56, 1),
        unit_of(100, 16),
        unit_of(5, 8),
        unit_of(64, 2),
        unit_of(2, 2),
        unit_of(7, 1),
        unit_of(8, 1, least=1),
    ],
    ids=lambda unit: f"{unit.least}-{unit.size}-by-{unit.step}",
)
def test_measured_sizes_are_the_nearest_to_their_shares(unit):
    curve = Curve((0.0,) * (unit.size + 1))
    found, narrower = (
        measured_sizes(unit, curve),
        [size for size in unit.sizes() if size < unit.size],
    )
    assert found[0] == unit.least
    assert found == sorted(set(found))
    assert set(found) <= set(narrower)
    for share in SHARES:
        distance = min(abs(size - share * unit.size) for size in narrower)
        assert min(abs(size - share * unit.size) for size in found) == distance
    assert len(found) <= len(SHARES)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(1, 400))
def test_measuring_takes_as_many_windows_as_its_passes_allow(windows, units):
    """A measurement runs half of the blocks, so a pass over one window pays for two."""
    ids = torch.arange(windows * 2).view(windows, 2)
    tokens = Tokens(ids, ids % 2 == 0)
    taken = windows_to_measure(tokens, units)
    count = len(taken.ids)
    assert torch.equal(taken.ids, ids[:count])
    assert torch.equal(taken.mask, tokens.mask[:count])
    assert min(2, windows) <= count <= windows

    def passes(count):
        return count * units * len(SHARES) / 2

    if count > 2:
        assert passes(count - 1) < PASSES * windows
    if 2 < count < windows:
        assert PASSES * windows <= passes(count)


# Divergence


@pytest.fixture(scope="module")
def padded():
    """Five windows, the last of them mostly padding."""
    tokens = sample(stream(4 * WINDOW + 5, seed=3), 9, WINDOW, 0)
    assert tokens.mask.sum(1).tolist() == [WINDOW] * 4 + [5]
    return tokens


def logits(model, tokens):
    with torch.inference_mode():
        return model.module(input_ids=tokens.ids, use_cache=False).logits.double()


def divergence_of(dense, narrow, mask):
    terms = kl_div(narrow.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="none")
    return float(terms.sum(-1)[mask].mean())


def solved(model, store, method, block):
    """Every unit of a block and its solution."""
    statistics = store.get(block.index, method.needs)
    return [(unit, method.solve(unit, block, statistics)) for unit in block.units(1)]


def middle(unit):
    return unit.sizes()[len(unit.sizes()) // 2]


@every_family
def test_divergence_is_that_of_two_full_passes(monkeypatch, opened, calibrated, padded, name):
    """Every kind of unit of the second block, gone and halved, in uneven batches."""
    monkeypatch.setattr(streams, "TOKENS_PER_BATCH", 2 * WINDOW)
    model, store = opened(name), calibrated(name).store
    dense, block = logits(model, padded), model.blocks[1]
    with torch.no_grad():
        divergence = Divergence(model, padded)
        assert len(divergence.stream.batches) == 3
        divergence.advance(model.blocks[0])
        assert divergence.of(block) == pytest.approx(0, abs=1e-5)
        for unit, solution in solved(model, store, Auto(), block):
            for size in (unit.sizes()[0], middle(unit)):
                with narrowed(block, unit, solution.at(size)):
                    narrow, found = logits(model, padded), divergence.of(block)
                expected = divergence_of(dense, narrow, padded.mask)
                assert found == pytest.approx(expected, rel=1e-4, abs=2e-6)
                if size == unit.sizes()[0]:
                    assert found > 1e-3


def test_padding_and_the_direction_matter(opened, calibrated, padded):
    """The mistakes: padded tokens counted, and the dense and the narrowed model swapped."""
    model, store = opened("llama"), calibrated("llama").store
    dense, block = logits(model, padded), model.blocks[0]
    unit, solution = solved(model, store, MoDeGPT(), block)[0]
    with torch.no_grad():
        divergence = Divergence(model, padded)
        with narrowed(block, unit, solution.at(0)):
            narrow, found = logits(model, padded), divergence.of(block)
    assert found == pytest.approx(divergence_of(dense, narrow, padded.mask), rel=1e-4)
    everywhere = torch.ones_like(padded.mask)
    assert found != pytest.approx(divergence_of(dense, narrow, everywhere), rel=1e-2)
    assert found != pytest.approx(divergence_of(narrow, dense, padded.mask), rel=1e-2)


@pytest.mark.parametrize("name", ["llama", "opt", "mistral", "gpt_neox"])
def test_divergence_is_the_same_from_every_place_before_the_change(
    opened, calibrated, padded, name
):
    model, store = opened(name), calibrated(name).store
    last = model.blocks[-1]
    unit, solution = solved(model, store, MoDeGPT(), last)[0]
    found = []
    with torch.no_grad():
        divergence = Divergence(model, padded)
        for block in model.blocks:
            with narrowed(last, unit, solution.at(middle(unit))):
                found.append(divergence.of(block))
            divergence.advance(block)
    assert found[0] > 1e-4
    assert found == pytest.approx([found[0]] * 3, rel=1e-6)


def test_losses_of_a_block_are_its_divergences(opened, calibrated, padded):
    model, data, told = opened("llama"), calibrated("llama"), []
    before = snapshot(model)
    with torch.no_grad():
        divergence, reference = Divergence(model, padded), Divergence(model, padded)
        for block in model.blocks:
            own = solved(model, data.store, Auto(), block)
            units, solutions = [u for u, _ in own], {u.name: s for u, s in own}
            losses = measure_losses(divergence, block, units, solutions, told.append)
            for unit, solution in own:
                assert len(losses[unit.name].errors) == unit.size + 1
                assert losses[unit.name].at(unit.size) == 0
                measured = {unit.size: 0.0}
                for size in measured_sizes(unit, solution.curve):
                    with narrowed(block, unit, solution.at(size)):
                        measured[size] = reference.of(block)
                assert losses[unit.name] == between(measured, solution.curve)
            reference.advance(block)
    assert sum(told) == len(model.units(1))
    assert_unchanged(model, before)


@pytest.mark.parametrize("method", [Auto(), MoDeGPT(), FLAP()])
def test_evidence_has_losses_only_for_who_spends_by_them(opened, calibrated, method):
    model, data, told = opened("qwen3"), calibrated("qwen3"), []
    units = {unit.name: unit for unit in method.units(model, 1)}
    found = score(model, method, data.store, data.tokens, advance=told.append)
    assert sum(told) == len(units)
    assert set(found.curves) == set(units)
    assert len(found.readings) == len(model.blocks)
    assert (found.losses is not None) == method.allocator.measured
    asked = score(model, method, data.store, data.tokens, Knapsack())
    assert asked.curves == found.curves
    assert {n: len(c.errors) for n, c in asked.losses.items()} == {
        n: unit.size + 1 for n, unit in units.items()
    }


# A block that is narrowed for a while


def snapshot(model):
    """Every tensor's name, layout and bits, every linear's sizes and which attentions there are."""
    attentions = [id(block.attention.module) for block in model.blocks]
    tensors = {
        name: (tuple(t.shape), t.dtype, t.stride(), t.requires_grad, t.detach().clone())
        for name, t in [*model.module.named_parameters(), *model.module.named_buffers()]
    }
    sizes = [
        {k: getattr(m, k) for k in ("in_features", "out_features", "nx", "nf") if hasattr(m, k)}
        for m in model.module.modules()
    ]
    return tensors, sizes, attentions


def assert_unchanged(model, before):
    tensors, sizes, attentions = snapshot(model)
    assert list(tensors) == list(before[0])
    for name, (*facts, bits) in tensors.items():
        *expected, old = before[0][name]
        assert facts == expected, name
        assert bits.numpy().tobytes() == old.numpy().tobytes(), name
    assert sizes == before[1]
    assert attentions == before[2]
    for block in model.blocks:
        assert block.module.get_submodule(block.anatomy.attention) is block.attention.module


def width(block, unit):
    if unit.kind == "mlp":
        return inputs_by_outputs(block.mlp.consumer).shape[0]
    return (
        block.attention.module.query_key
        if unit.kind == "query_key"
        else block.attention.module.value
    )


@every_family
def test_narrowed_gives_back_every_bit(opened, calibrated, padded, name):
    model, store = opened(name), calibrated(name).store
    before, dense, block = snapshot(model), logits(model, padded), model.blocks[1]
    for method in (Auto(), MoDeGPT()):
        for unit, solution in solved(model, store, method, block):
            for size in (unit.sizes()[0], middle(unit), unit.sizes()[-2]):
                with narrowed(block, unit, solution.at(size)):
                    assert width(block, unit) == size < unit.size
                assert width(block, unit) == unit.size
    assert_unchanged(model, before)
    assert torch.equal(logits(model, padded), dense)


@every_family
def test_narrowed_gives_back_every_bit_after_an_error(opened, calibrated, name):
    """One inside, and one in the middle of narrowing."""
    model, store = opened(name), calibrated(name).store
    before, block = snapshot(model), model.blocks[1]
    wrong = {
        "mlp": Narrowing(keep=torch.arange(3), consumer=torch.zeros(3)),
        "query_key": Narrowing(keep=torch.full((block.attention.module.kv_heads, 4), 10**6)),
        "value_output": Narrowing(encode=torch.zeros(3), consumer=torch.zeros(3, 3)),
    }
    for unit, solution in solved(model, store, MoDeGPT(), block):
        with pytest.raises(KeyError, match="inside"), narrowed(block, unit, solution.at(2)):
            raise KeyError("inside")
        assert_unchanged(model, before)
        with (
            pytest.raises((ValueError, RuntimeError, IndexError)),
            narrowed(block, unit, wrong[unit.kind]),
        ):
            pass
        assert_unchanged(model, before)
