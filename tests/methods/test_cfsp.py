"""CFSP: channels by norm and share of the weights, blocks by angle; attention counts and stays."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur import Budget, make_plan, score
from secateur.allocate.angular import Angular
from secateur.allocate.base import Evidence
from secateur.allocate.fluctuation import Fluctuation
from secateur.allocate.influence import EntropicInfluence
from secateur.allocate.knapsack import Knapsack
from secateur.allocate.uniform import Uniform
from secateur.calibration.needs import Needs
from secateur.calibration.statistics import Angle
from secateur.methods.cfsp import CFSP
from secateur.methods.flap import FLAP
from secateur.structure.costs import counted
from secateur.utils.errors import InputError
from tests.support.made import mlp

both = pytest.mark.parametrize("name", ["llama", "gpt2"])  # gated, and not


@pytest.fixture
def channels(opened, calibrated):
    """A block, its MLP's unit, statistics, norms, and its matrices as (channels, hidden)."""

    def found(name):
        model, data = opened(name, "float64"), calibrated(name)
        block, unit = model.blocks[1], model.blocks[1].units(4, ("mlp",))[0]
        statistics = data.store.get(1, frozenset({Needs.HIDDEN_ENERGY}))
        norms = statistics[Needs.HIDDEN_ENERGY].mean.sqrt()
        made = [w.t().double() for w in block.mlp.producer_weights]
        return block, unit, statistics, norms, [block.mlp.consumer_weight, *made]

    return found


@both
def test_scores_are_the_formula(channels, name):
    block, unit, statistics, norms, weights = channels(name)
    expected = torch.zeros(unit.size, dtype=torch.float64)
    for number, weight in enumerate(weights):
        read = weight.abs() * norms[:, None] if number == 0 else weight.abs()
        for i in range(read.shape[1]):
            for j in range(unit.size):
                expected[j] += norms[j] * read[j, i] / read[:, i].sum() / read.shape[1]
    assert torch.allclose(CFSP().scores(unit, block, statistics), expected, rtol=1e-12)


@both
def test_a_channel_weighed_against_itself_is_its_norm(channels, name):
    """The mistake of the released code, which ``within`` asks for and the default avoids."""
    block, unit, statistics, norms, weights = channels(name)
    released = CFSP(within=1).scores(unit, block, statistics)
    hidden = weights[0].shape[1]
    assert torch.allclose(released, len(weights) / hidden * norms, rtol=1e-12)
    own = CFSP().scores(unit, block, statistics)
    assert not torch.equal(own.argsort(), norms.argsort())


@pytest.mark.parametrize("part", ["read", "made"])
def test_heavier_weights_are_worth_more(channels, part):
    block, unit, statistics, norms, _ = channels("llama")
    low = int(CFSP().scores(unit, block, statistics).argmin())
    weight = block.mlp.consumer.weight if part == "read" else block.mlp.producer_weights[1]
    with torch.no_grad():
        weight[:, low] *= 1000
    assert int(CFSP().scores(unit, block, statistics).argsort().argsort()[low]) > 0
    released = CFSP(within=1).scores(unit, block, statistics)
    assert torch.equal(released.argsort(), norms.argsort())  # it doesn't notice


def test_silent_channels_and_empty_weights_are_worth_nothing(channels):
    block, unit, statistics, _, _ = channels("llama")
    with torch.no_grad():
        block.mlp.consumer.weight[0] = 0  # a hidden dim that no channel writes to
    statistics[Needs.HIDDEN_ENERGY].total = torch.zeros(unit.size, dtype=torch.float64)
    assert torch.equal(CFSP().scores(unit, block, statistics), torch.zeros(unit.size).double())


@pytest.mark.parametrize(
    "allocator", [Angular(), Uniform(), EntropicInfluence(0.2), Fluctuation(), Knapsack()]
)
def test_attention_counts_and_stays(opened, calibrated, allocator):
    """The mistake: a share of the MLPs alone, which no other method's ``keep`` is."""
    model, data, method = opened("llama"), calibrated("llama"), CFSP()
    evidence = score(model, method, data.store, data.tokens, allocator)
    budget = Budget(keep=0.8, multiple_of=1)
    plan = make_plan(
        model, method, evidence, data.record, data.tokens, budget=budget, allocator=allocator
    )
    heads = [row for row in plan.units if row.kind == "heads"]
    mlps = [row for row in plan.units if row.kind == "mlp"]
    assert len(heads) == len(mlps) == 3
    assert all(row.after == row.before and row.predicted_error == 0 for row in heads)
    whole = sum(u.parameters(u.size) for u in FLAP(compensate=0).units(model, 1))
    assert plan.budget.total == whole == sum(u.parameters(u.size) for u in model.units(1))
    spent = sum(row.parameters for row in plan.units)
    step = min(row.parameters // row.after for row in mlps)
    assert 0 <= 0.8 * whole - spent < step
    if isinstance(allocator, Uniform):  # what attention keeps, MLPs pay
        share = 1 - 0.2 * whole / (whole - sum(row.parameters for row in heads))
        assert all(abs(row.after - share * row.before) <= 1 for row in mlps)


def test_allocators_spend_what_attention_leaves_in_their_own_proportions(opened):
    """The mistake: shares that are out of reach, cut down to the budget step by step."""
    units = CFSP().units(opened("llama"), 1)
    prices, evidence = counted(units, "parameters", 4), Evidence({}, [(0.1,), (0.12,), (0.2,)])
    mlps = [unit for unit in units if not unit.fixed]
    left = 0.7 * prices.whole(units) - prices.still(units)
    keep = left / sum(prices.of(unit, unit.size) for unit in mlps)
    shares = Angular().of_blocks([0.1, 0.12, 0.2], [1, 1, 1], keep)
    assert max(shares) > 2 * min(shares)
    sizes = Angular().allocate(units, evidence, prices, 0.7)
    for unit, share in zip(mlps, shares, strict=True):
        assert abs(sizes[unit.name] - share * unit.size) <= 1


def test_what_attention_keeps_is_out_of_reach(opened):
    model, method = opened("llama"), CFSP()
    units = method.units(model, 4)
    prices = counted(units, "parameters", 4)
    fixed = prices.still(units) / prices.whole(units)
    assert 0.1 < fixed < 0.9
    for allocator in (Angular(), EntropicInfluence(0.2, 0.95)):
        with pytest.raises(InputError, match="out of reach"):
            allocator.check(units, prices, fixed)
    floor = 1 - 0.6 * (1 - fixed)  # a block may lose that much of its MLP, not of all it has
    EntropicInfluence(0.2, 0.6).check(units, prices, floor + 0.001)
    with pytest.raises(InputError, match="--max-sparsity"):
        EntropicInfluence(0.2, 0.6).check(units, prices, floor - 0.001)
    with pytest.raises(InputError, match="no size that may change here changes"):
        Angular().check(units, counted(units, "cache", 4), 0.9)
    everything = Angular().allocate(
        units, Evidence({}, [(0.1,), (0.2,), (0.3,)]), counted(units, "cache", 4), 1.0
    )
    assert everything == {unit.name: unit.size for unit in units}


angles = st.lists(st.floats(0, 1), min_size=1, max_size=10)


@settings(max_examples=200, deadline=None)
@given(angles, st.floats(0.01, 1), st.floats(0, 60), st.randoms())
def test_mean_share_is_keep_and_none_is_above_one(angles, keep, slope, rng):
    weights = [rng.randint(1, 1000) for _ in angles]
    found = Angular(slope=slope).of_blocks(angles, weights, keep)
    mean = math.fsum(w * s for w, s in zip(weights, found, strict=True)) / sum(weights)
    assert mean == pytest.approx(keep, rel=1e-12)
    assert all(0 <= s <= 1 + 1e-12 for s in found)
    for a, s in zip(angles, found, strict=True):
        assert all(s >= other - 1e-12 for b, other in zip(angles, found, strict=True) if a > b)


def test_contraction_leaves_the_largest_just_below_one():
    angles, weights = [0.05, 0.1, 0.6], [1, 1, 1]
    plain = [1 / (1 + math.exp(-26.2 * (a - 0.25))) for a in angles]
    mean = sum(plain) / 3
    assert 0.9 * plain[2] / mean > 1
    found = Angular().of_blocks(angles, weights, 0.9)
    assert found[2] == pytest.approx(0.9 + 0.1 / 1.05)
    draw = (found[2] - 0.9) / (plain[2] / mean - 1)
    assert found == pytest.approx([0.9 + draw * (g / mean - 1) for g in plain])
    loose = Angular().of_blocks(angles, weights, 0.2)  # nothing to contract
    assert loose == pytest.approx([0.2 * g / mean for g in plain])


def test_published_sums_over_tokens_are_a_slope():
    tokens, angles = 128 * 2048, [0.21, 0.14, 0.18]
    sums = [a * tokens for a in angles]
    middle = sum(sums) / 3
    published = [1 / (1 + math.exp(-(s - middle) / 1e4)) for s in sums]
    expected = [0.5 * g / (sum(published) / 3) for g in published]
    assert Angular().of_blocks(angles, [1, 1, 1], 0.5) == pytest.approx(expected, rel=1e-3)


def test_angles_of_known_turns():
    """Padding doesn't count, and parallel and opposite vectors are no rounding accident."""
    turns = torch.tensor([[0.0, 0.25, 0.5, 1.0, 0.7]]).double() * torch.pi
    before = torch.stack((torch.ones_like(turns), torch.zeros_like(turns)), -1) * 3
    after = torch.stack((turns.cos(), turns.sin()), -1) * 0.1
    found = Angle()
    found.update(before, after, mask=torch.tensor([[True] * 4 + [False]]))
    assert float(found.mean) == pytest.approx((0.25 + 0.5 + 1) / 4, abs=1e-7)


def test_shares_do_not_depend_on_how_much_text_there_is():
    """The mistake: sums over tokens under a fixed constant."""
    generator = torch.Generator().manual_seed(0)
    unit, shares = [mlp(i) for i in range(3)], []
    streams = [torch.randn(1, 50, 8, generator=generator) for _ in range(4)]
    mask = torch.ones(1, 50, dtype=torch.bool)
    for repeats in (1, 40):
        readings = []
        for i in range(3):
            angle = Angle()
            for _ in range(repeats):
                angle.update(streams[i], streams[i] + 0.5 * (i + 1) * streams[i + 1], mask=mask)
            readings.append(Angular().read(None, {Needs.ANGLE: angle}))
        prices = counted(unit, "parameters", 2)
        shares.append(Angular().shares(unit, Evidence({}, readings), prices, 0.5))
    assert shares[0] == pytest.approx(shares[1], rel=1e-9)
    assert max(shares[0].values()) > 1.2 * min(shares[0].values())


def test_no_weight_and_no_price_give_keep():
    unit = replace(mlp(0), least=32)
    assert unit.fixed
    assert unit.sizes() == [32]
    assert Angular().of_blocks([0.1, 0.2], [0, 0], 1.0) == [1.0, 1.0]
