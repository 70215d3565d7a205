"""Budgets over blocks and their rounding to allowed sizes."""

import math
import random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from secateur.allocate.base import Evidence, budget_of, fit
from secateur.allocate.influence import EntropicInfluence
from secateur.allocate.uniform import Uniform
from secateur.errors import InputError
from secateur.units import MLP, QueryKey, ValueOutput

influences = st.lists(st.floats(0, 1.5), min_size=1, max_size=12)
temperatures = st.floats(1e-3, 10)


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
    with pytest.raises(InputError, match=r"0\.400"):
        EntropicInfluence(0.05, 0.6).sparsities([0.0, 0.3], [1, 1], 0.7)


def units(rng, blocks=3, step=8):
    made = []
    hidden = rng.choice([16, 32, 48])
    bias = rng.random() < 0.5
    for i in range(blocks):
        made += [
            MLP(f"{i}.mlp", i, rng.randint(step, 90), step, hidden, 2, 2 * bias),
            QueryKey(f"{i}.qk", i, 2 * rng.randint(1, 8), 2, hidden, 4, 2, bias, bias, True),
            ValueOutput(
                f"{i}.vo", i, rng.randint(1, 16), 1, hidden, 4, 2, bias, rng.random() < 0.5
            ),
        ]
    return made


def spent(made, sizes):
    return sum(unit.parameters(sizes[unit.name]) for unit in made)


def next_steps(made, sizes):
    for unit in made:
        allowed = unit.sizes()
        at = allowed.index(sizes[unit.name])
        if at + 1 < len(allowed):
            yield unit.parameters(allowed[at + 1]) - unit.parameters(allowed[at])


@settings(max_examples=150, deadline=None)
@given(st.randoms(use_true_random=False), st.floats(0, 1), st.sampled_from([1, 4, 8]))
def test_fit_spends_the_budget_to_the_step(rng, keep, step):
    made = units(rng, step=step)
    ideal = {unit.name: rng.random() * unit.size for unit in made}
    budget = budget_of(made, keep)
    least = spent(made, {unit.name: unit.sizes()[0] for unit in made})
    if least > budget:
        with pytest.raises(InputError, match="out of reach"):
            fit(made, ideal, budget)
        return
    sizes = fit(made, ideal, budget)
    assert all(sizes[unit.name] in unit.sizes() for unit in made)
    assert spent(made, sizes) <= budget
    steps = list(next_steps(made, sizes))
    assert budget - spent(made, sizes) < min(steps, default=1)


@settings(max_examples=50, deadline=None)
@given(st.randoms(use_true_random=False))
def test_keep_one_gives_full_sizes(rng):
    made = units(rng)
    influence = [rng.random() for _ in range(3)]
    for allocator in (Uniform(), EntropicInfluence(0.1, 0.95)):
        sizes = allocator.allocate(made, Evidence({}, influence), 1.0)
        assert sizes == {unit.name: unit.size for unit in made}


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False), st.floats(0.55, 0.95))
def test_sizes_stay_near_their_ideal(rng, keep):
    made = [
        unit
        for i in range(4)
        for unit in (
            MLP(f"{i}.mlp", i, 256, 8, 64, 2, 0),
            QueryKey(f"{i}.qk", i, 32, 2, 64, 4, 2, False, False, True),
            ValueOutput(f"{i}.vo", i, 32, 1, 64, 4, 2, False, False),
        )
    ]
    influence = [rng.random() for _ in range(4)]
    allocator = EntropicInfluence(0.5, 0.9)
    evidence = Evidence({}, influence)
    shares, sizes = (f(made, evidence, keep) for f in (allocator.shares, allocator.allocate))
    for unit in made:
        assert abs(sizes[unit.name] - shares[unit.name] * unit.size) <= 2 * unit.step


def test_out_of_reach_names_the_reachable_range():
    made = units(random.Random(0))
    least = spent(made, {unit.name: unit.sizes()[0] for unit in made})
    whole = spent(made, {unit.name: unit.size for unit in made})
    with pytest.raises(InputError) as caught:
        fit(made, {unit.name: 0.0 for unit in made}, least - 1)
    lowest = float(str(caught.value).split("between ")[1].split()[0])
    assert least / whole <= lowest <= least / whole + 0.001
    sizes = fit(made, {unit.name: 0.0 for unit in made}, least)
    assert spent(made, sizes) == least
