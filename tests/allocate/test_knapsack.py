"""The budget over all units, against every combination of sizes."""

import math
import random
from itertools import accumulate, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.allocate.base import Evidence
from secateur.allocate.knapsack import Knapsack
from secateur.structure.costs import Prices, counted
from secateur.structure.error_curve import Curve
from secateur.utils.errors import InputError
from tests.support.made import mlp, query_key, value_output

TARGETS = ("parameters", "bytes", "flops", "cache")
GRAIN = 2**20  # losses are multiples of 1 / GRAIN, so that their sums are exact in any order
rngs = st.randoms(use_true_random=False)


def attention(block, width=4, rank=3, biased=False):
    return [
        query_key(block, width, biased=biased),
        value_output(block, rank, biased=biased, output_biased=not biased),
    ]


def losses_of(units, known):
    """Curves from losses at the allowed sizes alone; reading any other gives NaN."""
    curves = {}
    for unit in units:
        own = dict(zip(unit.sizes(), known[unit.name], strict=True))
        curves[unit.name] = Curve(tuple(own.get(k, math.nan) for k in range(unit.size + 1)))
    return curves


def falling(rng, units):
    """Random losses that fall with size, to zero at today's."""
    steps = {u.name: [rng.randint(0, GRAIN) / GRAIN for _ in u.sizes()[1:]] for u in units}
    return losses_of(units, {n: [*accumulate(own, initial=0)][::-1] for n, own in steps.items()})


def flat(units):
    return losses_of(units, {unit.name: [0.0] * len(unit.sizes()) for unit in units})


def random_prices(rng, units, most=60, free=0.2, fixed=0):
    table = {}
    for unit in units:
        steps = [0 if rng.random() < free else rng.randint(1, most) for _ in unit.sizes()[1:]]
        table[unit.name] = dict(zip(unit.sizes(), accumulate(steps, initial=0), strict=True))
    table[units[0].name][units[0].size] += 1  # something has a price
    return Prices("latency", table, fixed)


def without(units, sizes):
    """The blocks whose attention is gone."""
    return {unit.block for unit in units if unit.kind == "value_output" and not sizes[unit.name]}


def total(units, losses, sizes):
    """Summed losses; where no value is read, queries and keys lose nothing of their own."""
    gone = without(units, sizes)
    counts = (u for u in units if u.kind != "query_key" or u.block not in gone)
    return sum(losses[unit.name].at(sizes[unit.name]) for unit in counts)


def possible(units):
    """Every combination of sizes, but for queries and keys that nothing is read for."""
    for chosen in product(*(unit.sizes() for unit in units)):
        sizes = {unit.name: size for unit, size in zip(units, chosen, strict=True)}
        gone = without(units, sizes)
        if not any(sizes[u.name] for u in units if u.kind == "query_key" and u.block in gone):
            yield sizes


def least(units, losses, prices, budget):
    """The least loss within a budget, by looking at everything."""
    fitting = (s for s in possible(units) if prices.spent(units, s) <= budget)
    return min((total(units, losses, s) for s in fitting), default=math.inf)


def allocated(units, losses, prices, keep, **options):
    """What the knapsack gives, after what must always hold was checked."""
    sizes = Knapsack(**options).allocate(units, Evidence({}, (), losses), prices, keep)
    assert list(sizes) == [unit.name for unit in units]
    assert all(sizes[unit.name] in unit.sizes() for unit in units)
    assert prices.spent(units, sizes) <= prices.budget(units, keep)
    gone = without(units, sizes)
    assert not any(sizes[u.name] for u in units if u.kind == "query_key" and u.block in gone)
    return sizes


def assert_nothing_left_to_buy(units, losses, prices, keep, sizes):
    """No block's MLP or attention can be had larger, for what is left, without losing more."""
    left = prices.budget(units, keep) - prices.spent(units, sizes)
    for block, is_mlp in {(unit.block, unit.kind == "mlp") for unit in units}:
        own = [u for u in units if (u.block, u.kind == "mlp") == (block, is_mlp)]
        now, spent = total(own, losses, sizes), prices.spent(own, sizes)
        for other in possible(own):
            if spent < prices.spent(own, other) <= spent + left:
                assert total(own, losses, other) > now


@pytest.mark.parametrize("seed", range(8))
def test_four_units_of_five_sizes_are_as_brute_force_has_them(seed):
    rng = random.Random(seed)
    units = [mlp(block) for block in range(4)]
    assert [len(unit.sizes()) for unit in units] == [5] * 4
    prices, losses = random_prices(rng, units, fixed=seed % 2 * 50), falling(rng, units)
    for keep in (0.25, 0.5, 0.6, 0.75, 0.9):
        budget = prices.budget(units, keep)
        if budget < prices.fixed:
            continue
        sizes = allocated(units, losses, prices, keep)
        assert total(units, losses, sizes) == least(units, losses, prices, budget)
        assert_nothing_left_to_buy(units, losses, prices, keep, sizes)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=5, max_size=5),
        min_size=4,
        max_size=4,
    ),
    st.floats(0, 1),
)
def test_any_losses_are_spent_as_brute_force_spends(drawn, keep):
    """Losses in any order, not only falling ones: nothing leans on convexity."""
    units = [mlp(block) for block in range(4)]
    prices = Prices(
        "latency",
        {
            unit.name: dict(zip(unit.sizes(), accumulate(step for step, _ in own), strict=True))
            for unit, own in zip(units, drawn, strict=True)
        },
        1,
    )
    known = [[loss / 8 for _, loss in own] for own in drawn]
    losses = losses_of(units, dict(zip((u.name for u in units), known, strict=True)))
    floor = prices.spent(units, dict.fromkeys((u.name for u in units), 0))
    budget = prices.budget(units, keep)
    if floor > budget or prices.whole(units) == prices.fixed:
        with pytest.raises(InputError):
            Knapsack().allocate(units, Evidence({}, (), losses), prices, keep)
        return
    sizes = allocated(units, losses, prices, keep)
    assert total(units, losses, sizes) == least(units, losses, prices, budget)


@settings(max_examples=40, deadline=None)
@given(rngs, st.floats(0.02, 0.98))
def test_attention_is_one_choice_of_two_widths(rng, keep):
    units = [mlp(0, 16), *attention(0), *attention(1), mlp(2, 16), value_output(2, 3, least=1)]
    prices, losses = random_prices(rng, units), falling(rng, units)
    sizes = allocated(units, losses, prices, keep)
    expected = least(units, losses, prices, prices.budget(units, keep))
    assert total(units, losses, sizes) == expected
    assert_nothing_left_to_buy(units, losses, prices, keep, sizes)


def test_values_that_go_take_queries_and_keys_along_at_no_further_loss():
    """The mistake: to count the loss of queries and keys that nothing is read for any more."""
    units = [mlp(0, 16), *attention(0)]
    prices = Prices(
        "latency",
        {
            "0.mlp": {0: 0, 8: 10, 16: 20},
            "0.qk": {0: 0, 2: 5, 4: 10},
            "0.vo": {0: 0, 1: 3, 2: 6, 3: 10},
        },
    )
    losses = losses_of(units, {"0.mlp": [4, 2, 0], "0.qk": [9, 5, 0], "0.vo": [3, 2.5, 2.25, 0]})
    assert allocated(units, losses, prices, 0.5) == {"0.mlp": 16, "0.qk": 0, "0.vo": 0}
    # Two units apart would keep all queries and keys, which lose most, and no value to read.
    apart = {"0.mlp": 8, "0.qk": 4, "0.vo": 0}
    assert prices.spent(units, apart) <= prices.budget(units, 0.5)
    assert sum(losses[n].at(k) for n, k in apart.items()) < sum(
        losses[n].at(k) for n, k in {"0.mlp": 16, "0.qk": 0, "0.vo": 0}.items()
    )


def greedy(units, losses, prices, budget):
    """Step by step, whichever step gains most for its price."""
    sizes = {unit.name: 0 for unit in units}
    while True:
        steps = []
        for unit in units:
            now = sizes[unit.name]
            for size in unit.sizes():
                price = prices.of(unit, size) - prices.of(unit, now)
                if price > 0 and prices.spent(units, sizes) + price <= budget:
                    gain = losses[unit.name].at(now) - losses[unit.name].at(size)
                    steps.append((gain / price, unit.name, size))
        if not steps:
            return sizes
        _, name, size = max(steps)
        sizes[name] = size


def lagrangian(units, losses, prices, budget):
    """The best that one price of loss for all units can find within the budget."""
    found = []
    for rate in (k / 1000 for k in range(5000)):
        sizes = {
            unit.name: min(
                unit.sizes(),
                key=lambda k: losses[unit.name].at(k) + rate * prices.of(unit, k),
            )
            for unit in units
        }
        if prices.spent(units, sizes) <= budget:
            found.append(total(units, losses, sizes))
    return min(found)


def test_a_greedy_or_lagrangian_choice_is_beaten():
    """The mistakes: what gains most for its price blocks two others that gain more together, and
    no multiplier picks those two."""
    units = [mlp(block, size=8) for block in range(3)]
    dear, cheap = {0: 0, 8: 6}, {0: 0, 8: 5}
    prices = Prices("latency", {"0.mlp": dear, "1.mlp": cheap, "2.mlp": cheap})
    losses = losses_of(units, {"0.mlp": [6.5, 0], "1.mlp": [5, 0], "2.mlp": [5, 0]})
    keep = 10 / 16
    sizes = allocated(units, losses, prices, keep)
    assert sizes == {"0.mlp": 0, "1.mlp": 8, "2.mlp": 8}
    assert total(units, losses, sizes) == 6.5
    assert total(units, losses, greedy(units, losses, prices, 10)) == 10
    assert lagrangian(units, losses, prices, 10) == 10


def test_a_loss_that_falls_all_at_once_is_paid_for_as_a_whole():
    """The mistake: a step that gains nothing by itself is never taken."""
    units = [mlp(0), mlp(1)]
    prices = counted(units, "parameters", 2)
    losses = losses_of(units, {"0.mlp": [8, 8, 8, 0, 0], "1.mlp": [4, 3, 2, 1, 0]})
    assert allocated(units, losses, prices, 0.5) == {"0.mlp": 24, "1.mlp": 8}
    assert allocated(units, losses, prices, 0.37) == {"0.mlp": 0, "1.mlp": 16}


def test_losses_decide_and_not_the_units_own_errors():
    """The mistake: errors of different units' outputs, which don't compare."""
    units = [mlp(0), mlp(1)]
    mild, steep = [0.4, 0.3, 0.2, 0.1, 0], [4.0, 3, 2, 1, 0]
    losses = losses_of(units, {"0.mlp": mild, "1.mlp": steep})
    curves = losses_of(units, {"0.mlp": steep, "1.mlp": mild})
    prices = counted(units, "parameters", 2)
    sizes = Knapsack().allocate(units, Evidence(curves, (), losses), prices, 0.5)
    assert sizes == {"0.mlp": 0, "1.mlp": 32}


@pytest.mark.parametrize("seed", range(8))
def test_rounded_prices_keep_the_budget_and_lose_little(seed):
    """Prices in the hundreds of thousands on a hundred cells. What fits with one cell to spare for
    each group and one for the rest fits after rounding up; the mistake, rounding down, overspends.
    """
    rng = random.Random(seed)
    units = [mlp(0), mlp(1), *attention(2), mlp(3)]
    prices, losses = random_prices(rng, units, 999_983, free=0.0), falling(rng, units)
    for keep in (0.3, 0.5, 0.8):
        budget, groups = prices.budget(units, keep), 4
        cell = math.ceil(budget / 100)
        sizes = allocated(units, losses, prices, keep, cells=100)
        found = total(units, losses, sizes)
        assert least(units, losses, prices, budget) <= found
        assert found <= least(units, losses, prices, budget - (groups + 1) * cell)
        assert_nothing_left_to_buy(units, losses, prices, keep, sizes)


def test_enough_cells_make_rounded_prices_exact():
    rng, worse = random.Random(0), 0
    units = [mlp(block) for block in range(4)]
    for _ in range(6):
        prices, losses = random_prices(rng, units, 9973, free=0.0), falling(rng, units)
        best = least(units, losses, prices, prices.budget(units, 0.5))
        exact = allocated(units, losses, prices, 0.5, cells=10**6)
        assert total(units, losses, exact) == best
        worse += total(units, losses, allocated(units, losses, prices, 0.5, cells=100)) > best
    assert worse  # so the hundred cells were rounded to


def test_prices_with_a_common_measure_need_few_cells():
    """A cell is the measure of all prices, so the hundred are enough for millions."""
    rng = random.Random(1)
    units = [mlp(block) for block in range(4)]
    for _ in range(6):
        small, losses = random_prices(rng, units, 12), falling(rng, units)
        large = Prices(
            "latency",
            {n: {k: 99_991 * p + 7 for k, p in own.items()} for n, own in small.table.items()},
        )
        sizes = allocated(units, losses, large, 0.5, cells=100)
        assert total(units, losses, sizes) == least(units, losses, large, large.budget(units, 0.5))


@settings(max_examples=40, deadline=None)
@given(rngs, st.booleans(), st.sampled_from([100, 20_000]))
def test_keep_one_gives_full_sizes_even_where_nothing_is_lost(rng, even, cells):
    units = [mlp(0), *attention(0), mlp(1), *attention(1)]
    losses = flat(units) if even else falling(rng, units)
    most, free = (10**6, 0.0) if cells == 100 else (60, 0.2)
    tables = [random_prices(rng, units, most, free, fixed=17)]
    tables += [counted(units, target, 2) for target in TARGETS]
    for prices in tables:
        sizes = allocated(units, losses, prices, 1.0, cells=cells)
        assert sizes == {unit.name: unit.size for unit in units}


def test_keep_one_gives_full_sizes_where_sizes_of_one_price_are_rounded():
    unit = mlp(0)
    prices = Prices("latency", {"0.mlp": {0: 0, 8: 1, 16: 10**6 + 3, 24: 10**6 + 3, 32: 10**6 + 3}})
    assert allocated([unit], flat([unit]), prices, 1.0, cells=100) == {"0.mlp": 32}


@settings(max_examples=30, deadline=None)
@given(rngs)
def test_a_larger_budget_never_loses_more(rng):
    units = [mlp(0), *attention(0), mlp(1), *attention(1)]
    prices, losses = random_prices(rng, units), falling(rng, units)
    found = [
        total(units, losses, allocated(units, losses, prices, step / 12)) for step in range(13)
    ]
    assert found == sorted(found, reverse=True)
    assert found[-1] == 0


def test_of_equal_losses_the_larger_size_is_kept():
    unit = mlp(0, size=40)
    prices = counted([unit], "parameters", 2)
    known = {"0.mlp": [1, 0.5, 0.5, 0.5, 0.5, 0]}
    assert allocated([unit], losses_of([unit], known), prices, 0.85) == {"0.mlp": 32}
    assert allocated([unit], losses_of([unit], known), prices, 0.5) == {"0.mlp": 16}
    free = Prices("latency", {"0.mlp": {0: 0, 8: 5, 16: 5, 24: 5, 32: 5, 40: 9}})
    assert allocated([unit], losses_of([unit], known), free, 0.6) == {"0.mlp": 32}
    assert allocated([unit], flat([unit]), free, 0.6) == {"0.mlp": 32}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("multiple_of", [1, 8, 12])
def test_every_target_is_spent_as_brute_force_spends_it(target, multiple_of):
    rng = random.Random(multiple_of)
    width = {1: 3, 8: 20, 12: 30}[multiple_of]  # no multiple, so today's width stands apart
    for biases in (False, True):
        units = [
            unit
            for block in range(2)
            for unit in (
                mlp(block, width, multiple_of),
                *attention(block, width=4, rank=2, biased=biases),
            )
        ]
        losses, prices = falling(rng, units), counted(units, target, 2)
        floor = prices.spent(units, {unit.name: 0 for unit in units})
        for keep in (0.2, 0.5, 0.83):
            budget = prices.budget(units, keep)
            assert floor <= budget
            sizes = allocated(units, losses, prices, keep)
            assert total(units, losses, sizes) == least(units, losses, prices, budget)
            assert_nothing_left_to_buy(units, losses, prices, keep, sizes)
            widths = [sizes[unit.name] for unit in units if unit.kind == "mlp"]
            assert all(size % multiple_of == 0 or size == width for size in widths)
            if target == "cache":  # which no MLP takes any of
                assert widths == [width, width]


def test_what_is_fixed_is_counted_and_names_the_reachable_range():
    """The mistake: a share of what can shrink, where the budget is a share of everything."""
    units = [mlp(0), mlp(1)]
    prices = Prices("latency", {u.name: {0: 0, 8: 8, 16: 16, 24: 24, 32: 32} for u in units}, 64)
    losses = losses_of(units, {"0.mlp": [4, 3, 2, 1, 0], "1.mlp": [8, 6, 4, 2, 0]})
    assert allocated(units, losses, prices, 0.75) == {"0.mlp": 0, "1.mlp": 32}
    assert allocated(units, losses, prices, 0.5) == {"0.mlp": 0, "1.mlp": 0}
    with pytest.raises(InputError, match=r"nanoseconds.*\(64 of 128\).* 0\.50. and 1"):
        Knapsack().allocate(units, Evidence({}, (), losses), prices, 0.49)
