"""Budgets over blocks and their rounding to allowed sizes."""

import math
from itertools import accumulate

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from secateur.allocate import ALLOCATORS, allocator_class
from secateur.allocate.alpha import AlphaPruning
from secateur.allocate.angular import Angular
from secateur.allocate.base import Evidence, fit
from secateur.allocate.influence import EntropicInfluence
from secateur.allocate.uniform import Uniform
from secateur.structure.costs import Prices, counted
from secateur.utils.errors import InputError
from tests.support.made import mlp, query_key, value_output

TARGETS = ("parameters", "bytes", "flops", "cache")
every_target = pytest.mark.parametrize("target", TARGETS)
influences = st.lists(st.floats(0, 1.5), min_size=1, max_size=12)
temperatures = st.floats(1e-3, 10)


def of_influence(*values):
    return Evidence({}, [(value,) for value in values])


def mean(values, weights):
    return math.fsum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)


@settings(max_examples=200, deadline=None)
@given(influences, temperatures, st.floats(0.3, 1.0), st.floats(0, 1), st.randoms())
def test_sum_is_the_budget_and_caps_hold(influence, temperature, cap, share, rng):
    weights = [rng.randint(1, 1000) for _ in influence]
    wanted = share * cap
    found = EntropicInfluence(temperature, cap).sparsities(influence, weights, wanted)
    assert mean(found, weights) == pytest.approx(wanted, abs=1e-12)
    assert all(0 <= phi <= cap * (1 + 1e-9) for phi in found)


@settings(max_examples=100, deadline=None)
@given(influences, temperatures, st.floats(0.05, 0.9))
def test_more_influence_means_less_sparsity(influence, temperature, wanted):
    """The mistake: a softmax with the wrong sign, or on the kept share, reverses this."""
    found = EntropicInfluence(temperature, 0.95).sparsities(influence, [7] * len(influence), wanted)
    for s, phi in zip(influence, found, strict=True):
        for other, psi in zip(influence, found, strict=True):
            if s > other:
                assert phi <= psi + 1e-12


def test_wrong_signs_are_told_apart():
    influence, weights = [0.1, 0.4, 0.9], [1, 1, 1]
    right = EntropicInfluence(0.3, 1.0).sparsities(influence, weights, 0.2)
    scale = [math.exp(-s / 0.3) for s in influence]
    assert right == pytest.approx([0.6 * x / sum(scale) for x in scale], abs=1e-12)
    assert right[0] > right[1] > right[2]
    reversed_scale = [math.exp(s / 0.3) for s in influence]
    reverse = [0.6 * x / sum(reversed_scale) for x in reversed_scale]
    on_keep = [1 - 2.4 * x / sum(scale) for x in scale]
    assert reverse[0] < reverse[2]
    assert on_keep[0] < on_keep[2]


def test_a_hot_allocation_is_uniform_and_a_cold_one_takes_whole_blocks():
    influence, weights = [0.1, 0.5, 0.2, 0.9], [5, 1, 2, 4]
    hot = EntropicInfluence(1e7, 0.9).sparsities(influence, weights, 0.4)
    assert hot == pytest.approx([0.4] * 4, abs=1e-6)
    cold = EntropicInfluence(1e-4, 0.9).sparsities(influence, weights, 0.9 * 7 / 12)
    assert cold == pytest.approx([0.9, 0, 0.9, 0], abs=1e-6)


def objective(phi, influence, weights, temperature):
    kept = sum(w * s * (1 - p) for w, s, p in zip(weights, influence, phi, strict=True))
    entropy = -sum(w * p * math.log(p) for w, p in zip(weights, phi, strict=True) if p > 0)
    return kept + temperature * entropy


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=8), st.floats(0.1, 2), st.randoms())
def test_no_small_shift_between_blocks_does_better(influence, temperature, rng):
    weights = [rng.randint(1, 9) for _ in influence]
    found = EntropicInfluence(temperature, 1.0).sparsities(influence, weights, 0.1)
    assume(max(found) < 0.99)
    best = objective(found, influence, weights, temperature)
    for _ in range(20):
        i, j = rng.sample(range(len(found)), 2)
        shift = rng.uniform(0, 0.1) * min(found[i] * weights[i], found[j] * weights[j])
        other = list(found)
        other[i] -= shift / weights[i]
        other[j] += shift / weights[j]
        assert objective(other, influence, weights, temperature) <= best + 1e-9


def test_what_the_cap_cuts_off_goes_to_the_others():
    found = EntropicInfluence(0.05, 0.6).sparsities([0.0, 0.3, 0.5], [1, 1, 1], 0.4)
    assert found[0] == 0.6
    assert sum(found) == pytest.approx(1.2, abs=1e-12)
    assert found[1] / found[2] == pytest.approx(math.exp(4))


@pytest.mark.parametrize("fixed", [0, 100])
def test_the_cap_names_what_is_within_reach(fixed):
    """In shares of the target, of which a part may be out of any size's reach."""
    unit = mlp(0, 100, 1)
    prices = Prices("latency", {unit.name: {s: s for s in unit.sizes()}}, fixed)
    allocator, least = EntropicInfluence(0.05, 0.6), (fixed + 40) / (fixed + 100)
    allocator.check([unit], prices, least)
    with pytest.raises(InputError, match=f"at least {least:.3f}|at least {least + 0.001:.3f}"):
        allocator.check([unit], prices, least - 0.01)


def units(rng, blocks=3, step=8):
    made = []
    hidden = rng.choice([16, 32, 48])
    bias = rng.random() < 0.5
    for i in range(blocks):
        made += [
            mlp(i, rng.randint(step, 90), step, hidden, 2 * bias),
            query_key(i, 2 * rng.randint(1, 8), hidden, bias),
            value_output(i, rng.randint(1, 16), hidden, bias, rng.random() < 0.5),
        ]
    return made


def even_units(blocks=4):
    return [
        unit
        for i in range(blocks)
        for unit in (
            mlp(i, 256, hidden=64),
            query_key(i, 32, 64, rotary=False),
            value_output(i, 32, 64),
        )
    ]


def timed(rng, made):
    """Prices as latency has them: uneven steps, free ones among them, and a fixed rest."""
    table = {}
    for unit in made:
        steps = [rng.choice([0, rng.randint(1, 999)]) for _ in unit.sizes()[1:]]
        table[unit.name] = dict(zip(unit.sizes(), accumulate(steps, initial=0), strict=True))
    return Prices("latency", table, rng.randint(0, 5000))


def some_prices(rng, made):
    target = rng.choice([*TARGETS, "latency"])
    return timed(rng, made) if target == "latency" else counted(made, target, rng.choice([2, 4]))


def choices_of(allocator, made):
    return {unit.name: allocator.choices(unit) for unit in made}


def least_of(allocator, made, prices):
    return prices.spent(made, {n: sizes[0] for n, sizes in choices_of(allocator, made).items()})


def next_steps(made, allowed, prices, sizes):
    """What growing any one unit by one of its allowed steps would cost."""
    for unit in made:
        own = allowed[unit.name]
        at = own.index(sizes[unit.name])
        if at + 1 < len(own):
            yield prices.of(unit, own[at + 1]) - prices.of(unit, own[at])


def assert_spent_to_the_step(made, allowed, prices, budget, sizes):
    assert all(sizes[unit.name] in allowed[unit.name] for unit in made)
    left = budget - prices.spent(made, sizes)
    assert left >= 0
    assert all(left < step for step in next_steps(made, allowed, prices, sizes))


@settings(max_examples=150, deadline=None)
@given(st.randoms(use_true_random=False), st.floats(0, 1), st.sampled_from([1, 4, 8]))
def test_fit_spends_the_budget_to_the_step(rng, share, step):
    made = units(rng, step=step)
    prices = some_prices(rng, made)
    ideal = {unit.name: rng.random() * unit.size for unit in made}
    allowed = {  # any sizes, in any gaps
        unit.name: sorted(rng.sample(unit.sizes(), rng.randint(1, len(unit.sizes()))))
        for unit in made
    }
    least = prices.spent(made, {name: own[0] for name, own in allowed.items()})
    budget = least + int(share * (prices.whole(made) - least))
    sizes = fit(made, allowed, ideal, prices, budget)
    assert_spent_to_the_step(made, allowed, prices, budget, sizes)


@settings(max_examples=200, deadline=None)
@given(st.randoms(use_true_random=False), st.floats(0, 1), st.sampled_from([1, 4, 8, 16]))
def test_share_allocators_spend_every_budget_to_the_step(rng, keep, step):
    made = units(rng, step=step)
    prices = some_prices(rng, made)
    assume(prices.whole(made) > prices.fixed)
    evidence = of_influence(*(rng.random() for _ in range(3)))
    for allocator in (Uniform(), EntropicInfluence(0.2, 1.0)):
        budget = prices.budget(made, keep)
        if least_of(allocator, made, prices) > budget:
            with pytest.raises(InputError, match="out of reach"):
                allocator.allocate(made, evidence, prices, keep)
            continue
        sizes = allocator.allocate(made, evidence, prices, keep)
        assert_spent_to_the_step(made, choices_of(allocator, made), prices, budget, sizes)
        assert all(sizes.values())  # no unit goes altogether


@pytest.mark.parametrize("name", sorted(set(ALLOCATORS) - {"plain"}))
def test_only_who_knows_what_is_lost_lets_a_unit_go(name):
    allocator = allocator_class(name)()
    for unit in even_units(1):
        all_sizes = [0, *range(unit.step, unit.size, unit.step), unit.size]
        found = allocator.choices(unit)
        if name in ("greedy", "spdy"):  # some of all sizes
            assert found == sorted(set(found) & set(all_sizes))
            assert (found[0], found[-1]) == (0, unit.size)
        else:
            assert found == all_sizes[name not in ("knapsack", "least-error") :]
    assert allocator.measured == (name == "knapsack")


@every_target
@pytest.mark.parametrize("allocator", [Uniform(), EntropicInfluence(0.2, 0.95)])
@pytest.mark.parametrize("keep", [0.3, 0.8])
def test_every_target_is_met_in_its_own_currency(target, allocator, keep):
    """The mistake: to spend parameters whatever the target is.

    Free steps are always taken, so a budget of cache leaves the MLPs alone."""
    made = even_units()
    prices = counted(made, target, 2)
    sizes = allocator.allocate(made, of_influence(0.1, 0.2, 0.3, 0.4), prices, keep)
    reached = sum(
        {
            "parameters": cost.parameters,
            "bytes": cost.bytes,
            "flops": cost.flops_per_token,
            "cache": cost.cache_bytes_per_token,
        }[target]
        for cost in (unit.cost(sizes[unit.name], 2) for unit in made)
    )
    assert reached == prices.spent(made, sizes)
    assert keep - 0.01 < reached / prices.whole(made) <= keep
    by_parameters = allocator.allocate(
        made, of_influence(0.1, 0.2, 0.3, 0.4), counted(made, "parameters", 2), keep
    )
    if target == "cache":
        assert all(sizes[unit.name] == unit.size for unit in made if unit.kind == "mlp")
        assert prices.spent(made, by_parameters) != reached


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False))
def test_keep_one_gives_full_sizes(rng):
    made = units(rng)
    prices = some_prices(rng, made)
    assume(prices.whole(made) > prices.fixed)
    influence = [rng.random() for _ in range(3)]
    for allocator in (Uniform(), EntropicInfluence(0.1, 0.95)):
        sizes = allocator.allocate(made, of_influence(*influence), prices, 1.0)
        assert sizes == {unit.name: unit.size for unit in made}


@settings(max_examples=60, deadline=None)
@given(
    st.randoms(use_true_random=False),
    st.floats(0.55, 0.95),
    st.sampled_from(["parameters", "bytes", "flops"]),
)
def test_sizes_stay_near_their_ideal(rng, keep, target):
    made = even_units()
    prices = counted(made, target, 2)
    evidence = of_influence(*(rng.random() for _ in range(4)))
    for allocator in (Uniform(), EntropicInfluence(0.5, 0.9)):
        shares = allocator.shares(made, evidence, prices, keep)
        sizes = allocator.allocate(made, evidence, prices, keep)
        for unit in made:
            assert abs(sizes[unit.name] - shares[unit.name] * unit.size) <= 2 * unit.step


def test_uniform_rounds_to_the_budget_and_stays_even():
    """The mistakes: every size to the nearest allowed one, which overspends; or the rest of the
    budget all on the first unit."""
    made = [mlp(i, 96) for i in range(6)]
    prices, keep = counted(made, "parameters", 2), 54 / 96
    nearest = {u.name: min(u.sizes(), key=lambda size: abs(size - 54.1)) for u in made}
    assert prices.spent(made, nearest) > prices.budget(made, keep)
    sizes = Uniform().allocate(made, Evidence({}), prices, keep)
    assert sorted(sizes.values()) == [48, 48, 56, 56, 56, 56]


def test_influence_weighs_blocks_by_their_price():
    """The mistake: a plain mean over blocks, which misses the budget where blocks differ."""
    made = [mlp(0, 2400, 1), mlp(1, 800, 1)]
    prices, evidence = counted(made, "parameters", 2), of_influence(0.1, 0.3)
    shares = EntropicInfluence(0.2, 1.0).shares(made, evidence, prices, 0.8)
    scale = [math.exp(-s / 0.2) for s in (0.1, 0.3)]
    level = 0.2 * 3200 / (2400 * scale[0] + 800 * scale[1])
    assert shares == pytest.approx({"0.mlp": 1 - level * scale[0], "1.mlp": 1 - level * scale[1]})
    sizes = EntropicInfluence(0.2, 1.0).allocate(made, evidence, prices, 0.8)
    assert sum(sizes.values()) == 2560
    assert abs(sizes["0.mlp"] - 2400 * shares["0.mlp"]) <= 1


@every_target
@pytest.mark.parametrize("allocator", [Uniform(), EntropicInfluence(1e7, 1.0)])
def test_out_of_reach_names_the_reachable_range(target, allocator):
    made = [unit for unit in even_units() if target != "cache" or unit.kind != "mlp"]
    prices, evidence = counted(made, target, 2), of_influence(0.1, 0.2, 0.3, 0.4)
    least, whole = least_of(allocator, made, prices), prices.whole(made)
    with pytest.raises(InputError, match=f"{least:,} of {whole:,}") as caught:
        allocator.allocate(made, evidence, prices, (least - 1) / whole)
    lowest = float(str(caught.value).split("between ")[1].split()[0])
    assert least / whole <= lowest <= least / whole + 0.001
    assert least <= prices.spent(made, allocator.allocate(made, evidence, prices, lowest))
    exact = math.nextafter(least / whole, 1)
    sizes = allocator.allocate(made, evidence, prices, exact)
    assert prices.spent(made, sizes) == least
    with pytest.raises(InputError, match="out of reach"):
        allocator.check(made, prices, lowest - 0.0011)


@pytest.mark.parametrize("name", ALLOCATORS)
def test_a_target_that_no_size_changes_is_refused(name):
    made = [mlp(0, 64)]
    with pytest.raises(InputError, match="no size changes the bytes of KV cache"):
        allocator_class(name)().check(made, counted(made, "cache", 2), 0.8)


def test_uniform_means_one_share_where_some_of_the_price_is_fixed():
    """Half of the time is fixed, so keeping 0.7 of all leaves 0.4 of what can shrink."""
    made = even_units()
    table = counted(made, "parameters", 2).table
    prices = Prices("latency", table, Prices("latency", table).whole(made))
    sizes = Uniform().allocate(made, Evidence({}), prices, 0.7)
    for unit in made:
        assert abs(sizes[unit.name] - 0.4 * unit.size) <= 2 * unit.step


def test_the_least_share_named_is_enough():
    unit = mlp(0, 16)
    for whole, least in ((n, k) for n in (100, 1000) for k in range(1, n)):
        prices = Prices("parameters", {"0.mlp": {0: 0, 8: least, 16: whole}})
        with pytest.raises(InputError) as caught:
            Uniform().check([unit], prices, (least - 0.5) / whole)
        named = float(str(caught.value).split("between ")[1].split()[0])
        Uniform().check([unit], prices, named)


@pytest.mark.parametrize("allocator", [AlphaPruning(), Angular(), EntropicInfluence()])
def test_blocks_without_units_have_no_say(allocator):
    """The mistake: extremes of blocks that can't change stretch the scale of all others."""
    units = [mlp(1), mlp(2), query_key(2, 8), mlp(4)]
    prices = counted(units, "parameters", 2)
    found = [
        allocator.shares(units, Evidence({}, [(v,) for v in readings]), prices, 0.6)
        for readings in ((1.0, 0.3, 0.2, 1.0, 0.4), (9.0, 0.3, 0.2, 0.0, 0.4))
    ]
    assert found[0] == found[1]
    assert len(set(found[0].values())) == 3  # one a block
    assert allocator.shares([], Evidence({}, [(0.3,)]), prices, 1.0) == {}
