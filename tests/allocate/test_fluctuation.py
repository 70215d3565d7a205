"""FLAP's allocation: standardised fluctuations, and one threshold over all blocks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.allocate.base import Evidence
from secateur.allocate.fluctuation import Fluctuation, standardised
from secateur.calibration.needs import Needs
from secateur.calibration.statistics import Moments
from secateur.methods.flap import FLAP
from secateur.methods.modegpt import MoDeGPT
from secateur.structure.costs import Prices, counted
from secateur.structure.units import MLP, Heads
from secateur.utils.errors import InputError
from tests.support.blocks import axis
from tests.support.made import mlp, query_key, value_output

TARGETS = ("parameters", "bytes", "flops", "cache")


def heads(block, size, hidden=16):
    fields = {"name": f"{block}.heads", "block": block, "size": size, "step": 1, "hidden": hidden}
    biases = {"query_bias": False, "key_bias": False, "value_bias": False}
    return Heads(**fields, **biases, group=2, query_key=4, value=4)


def channels(block, size, hidden=16):
    return MLP(f"{block}.mlp", block, size, 1, hidden, producers=2, biased_producers=0)


# What is read of a block


def test_standardised_scores_have_mean_zero_and_spread_one():
    scores = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)
    found = standardised(scores)
    expected = [(s - 3) / (14 / 3) ** 0.5 for s in scores.tolist()]  # Σ(s − 3)² = 14, n − 1 = 3
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert standardised(torch.full((3,), 0.1)).tolist() == [0, 0, 0]
    assert standardised(torch.tensor([7.0])).tolist() == [0]


def statistics_of(block, seed=0):
    """Any moments: variances from 0 to 1, means that don't matter."""
    generator, made = torch.Generator().manual_seed(seed), {}
    for need, kind in ((Needs.HIDDEN_MOMENTS, "mlp"), (Needs.MIXED_MOMENTS, "heads")):
        width = axis(block, kind).read().shape[:2].numel()
        mean = torch.randn(width, generator=generator, dtype=torch.float64)
        variance = torch.rand(width, generator=generator, dtype=torch.float64)
        made[need] = Moments(10 * torch.stack((mean, variance + mean.square())), 10)
    return made


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_reading_is_z_of_heads_then_of_channels(opened, name):
    block = opened(name, "float64").blocks[0]
    statistics = statistics_of(block)
    found = Fluctuation().read(block, statistics)
    kv_heads, width = block.attention.module.kv_heads, len(block.mlp.consumer_weight)
    assert len(found) == kv_heads + width

    def fluctuation(need, rows):
        weights = [float((row**2).sum()) for row in rows]
        pairs = zip(statistics[need].variance.tolist(), weights, strict=True)
        return torch.tensor([v * w for v, w in pairs], dtype=torch.float64)

    own = fluctuation(Needs.HIDDEN_MOMENTS, block.mlp.consumer_weight)
    expected = (own - own.mean()) / own.std()
    assert found[kv_heads:] == pytest.approx(expected.tolist(), rel=1e-9)
    squared = fluctuation(Needs.MIXED_MOMENTS, block.attention.output_rows.flatten(0, 1)).square()
    z = (squared - squared.mean()) / squared.std()  # over the coordinates of all heads
    expected = z.view(kv_heads, -1).mean(1)
    assert found[:kv_heads] == pytest.approx(expected.tolist(), rel=1e-9)
    # The mistakes: means first, then standardised; and scores that are not squared.
    means = squared.view(kv_heads, -1).mean(1)
    assert found[:kv_heads] != pytest.approx(((means - means.mean()) / means.std()).tolist())
    z = (squared.sqrt() - squared.sqrt().mean()) / squared.sqrt().std()
    assert found[:kv_heads] != pytest.approx(z.view(kv_heads, -1).mean(1).tolist())


# One threshold

# Two blocks of two heads and four channels; a head costs three channels.
UNITS = [channels(0, 4), heads(0, 2), channels(1, 4), heads(1, 2)]
READINGS = ((0.5, -0.2, 1.5, 0.1, -0.5, -1.1), (-0.1, 0.3, 0.9, 0.7, -0.3, -1.2))
PRICES = Prices(
    "parameters",
    {u.name: {s: s * (1 if u.kind == "mlp" else 3) for s in u.sizes()} for u in UNITS},
)


@pytest.mark.parametrize(
    ("keep", "kept"),  # by z: 1.5 .9 .7 | .5* .3* | .1 −.1* −.2* | −.3 −.5 −1.1 −1.2; * is a head
    [
        (3 / 20, (1, 0, 2, 0)),
        (5 / 20, (1, 0, 2, 0)),  # the next, a head, is too dear
        (6 / 20, (1, 1, 2, 0)),
        (9 / 20, (1, 1, 2, 1)),
        (10 / 20, (2, 1, 2, 1)),
        (16 / 20, (2, 2, 2, 2)),
        (18 / 20, (3, 2, 3, 2)),
        (1.0, (4, 2, 4, 2)),
    ],
)
def test_what_stays_is_above_one_threshold(keep, kept):
    shares = Fluctuation().shares(UNITS, Evidence({}, READINGS), PRICES, keep)
    expected = {u.name: count / u.size for u, count in zip(UNITS, kept, strict=True)}
    assert shares == pytest.approx(expected)


def test_widths_of_heads_share_what_heads_keep():
    """For methods that narrow every head instead: the attention's share is that of all of them."""
    units = [mlp(0, 4, 1), query_key(0, 8), value_output(0, 8)]
    prices = Prices(
        "parameters",
        {"0.mlp": {4: 4}, "0.qk": {8: 2}, "0.vo": {8: 4}},  # two heads, three each
    )
    readings = ((0.5, -0.2, 1.5, 0.1, -0.5, -1.1),)
    shares = Fluctuation().shares(units, Evidence({}, readings), prices, 0.5)
    assert shares == pytest.approx({"0.mlp": 2 / 4, "0.qk": 1 / 2, "0.vo": 1 / 2})


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from(TARGETS), st.floats(0, 1))
def test_the_budget_is_met_to_the_step(rng, target, share):
    units, readings = [], []
    for block in range(3):
        width, count = rng.randint(2, 12), rng.choice([1, 2, 4])
        units += [channels(block, width), heads(block, count)]
        readings.append(tuple(rng.gauss(0, 1) for _ in range(count + width)))
    prices, allocator = counted(units, target, 2), Fluctuation()
    least = prices.spent(units, {unit.name: 1 for unit in units})
    keep = least / prices.whole(units) + share * (1 - least / prices.whole(units))
    if prices.budget(units, keep) < least:  # by rounding
        return
    sizes = allocator.allocate(units, Evidence({}, readings), prices, keep)
    left = prices.budget(units, keep) - prices.spent(units, sizes)
    steps = [
        prices.of(unit, sizes[unit.name] + 1) - prices.of(unit, sizes[unit.name])
        for unit in units
        if sizes[unit.name] < unit.size
    ]
    assert all(sizes.values())
    assert 0 <= left < min([step for step in steps if step], default=left + 1)


@pytest.mark.parametrize("method", [FLAP, MoDeGPT])
def test_more_goes_where_less_fluctuates(opened, method):
    """Whatever the method; and nothing of the allocation depends on its curves."""
    model, allocator = opened("llama"), Fluctuation()
    units = method().units(model, 4)
    prices = counted(units, "parameters", 4)
    # The channels of one block are all alike, those of another a few that count for the rest.
    readings = [(0.1, -0.1, *(56 * [0.0])), (0.1, -0.1, *(8 * [2.0]), *(48 * [-0.33]))]
    evidence = Evidence({}, [*readings, readings[0]])
    sizes = allocator.allocate(units, evidence, prices, 0.6)
    assert sizes["layers.1.mlp"] < min(sizes["layers.0.mlp"], sizes["layers.2.mlp"])


def test_it_is_of_no_use_without_channels():
    for units in ([heads(0, 2)], [channels(0, 4), heads(0, 2), heads(1, 2)]):
        with pytest.raises(InputError, match=r"fluctuation.*channels.*uniform"):
            Fluctuation().check(units, counted(units, "parameters", 2), 0.9)
