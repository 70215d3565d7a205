"""One width for all MLPs, against every width."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.allocate.base import Evidence
from secateur.allocate.plain import PlainWidth
from secateur.allocate.uniform import Uniform
from secateur.structure.costs import Prices, counted
from secateur.utils.errors import InputError
from tests.support.made import mlp, query_key, value_output

TARGETS = ("parameters", "bytes", "flops")  # of cache, an MLP takes nothing
NOTHING = Evidence({})


def units(width=90, step=8, blocks=3, hidden=16):
    made = []
    for i in range(blocks):
        made += [
            mlp(i, width, step, hidden, 2),
            query_key(i, 8, hidden, True),
            value_output(i, 4, hidden, True),
        ]
    return made


def with_width(made, width):
    return {unit.name: width if unit.kind == "mlp" else unit.size for unit in made}


def widths(made):
    """Every width that an MLP may have, the multiples and today's; none goes altogether."""
    mlp = next(unit for unit in made if unit.kind == "mlp")
    return [k for k in range(1, mlp.size + 1) if k % mlp.step == 0 or k == mlp.size]


def refusal(made, prices, keep):
    with pytest.raises(InputError, match="out of reach") as caught:
        PlainWidth().allocate(made, NOTHING, prices, keep)
    return str(caught.value)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 120),
    st.sampled_from([1, 4, 8, 16, 64]),
    st.sampled_from(TARGETS),
    st.integers(0, 9999),
    st.floats(0, 1),
)
def test_the_largest_width_that_fits(width, step, target, fixed, keep):
    """Attention is untouched, and counted."""
    made = units(width, step)
    prices = Prices(target, counted(made, target, 2).table, fixed)
    budget = prices.budget(made, keep)
    fitting = [k for k in widths(made) if prices.spent(made, with_width(made, k)) <= budget]
    if not fitting:
        refusal(made, prices, keep)
        return
    sizes = PlainWidth().allocate(made, NOTHING, prices, keep)
    assert sizes == with_width(made, max(fitting))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("multiple_of", [1, 8, 16, 64])
def test_multiples_are_met_and_less_than_one_step_is_left_over(target, multiple_of):
    made = units(250, multiple_of)
    prices = counted(made, target, 2)
    for keep in (0.5, 0.7, 0.9, 0.99):
        sizes = PlainWidth().allocate(made, NOTHING, prices, keep)
        (width,) = {sizes[unit.name] for unit in made if unit.kind == "mlp"}
        assert width % multiple_of == 0
        left = prices.budget(made, keep) - prices.spent(made, sizes)
        larger = with_width(made, min(250, width + multiple_of))
        assert 0 <= left < prices.spent(made, larger) - prices.spent(made, sizes)


def test_one_width_where_an_uneven_one_would_spend_more():
    """The mistake: rounding every MLP to what is left gives some of them one step more."""
    made = units(64, 8, blocks=5)
    prices, keep = counted(made, "parameters", 2), 0.7
    sizes = PlainWidth().allocate(made, NOTHING, prices, keep)
    assert len({sizes[unit.name] for unit in made if unit.kind == "mlp"}) == 1
    mlps = [unit for unit in made if unit.kind == "mlp"]
    rest = prices.whole(made) - prices.whole(mlps)
    share = (prices.budget(made, keep) - rest) / prices.whole(mlps)
    uneven = Uniform().allocate(mlps, NOTHING, prices, share)
    assert len(set(uneven.values())) == 2
    assert prices.spent(made, sizes) < rest + prices.spent(mlps, uneven)
    # The mistake: the share of everything taken for the MLPs' own share.
    naive = with_width(made, 8 * int(keep * 64 / 8))
    assert prices.spent(made, naive) > prices.budget(made, keep)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("multiple_of", [1, 8, 64])
def test_out_of_reach_names_the_reachable_range(target, multiple_of):
    made = units(250, multiple_of)
    prices = counted(made, target, 2)
    least = with_width(made, multiple_of)
    floor, whole = prices.spent(made, least), prices.whole(made)
    message = refusal(made, prices, 0.05)
    assert f"{floor:,} of {whole:,}" in message
    lowest = float(message.split("between ")[1].split()[0])
    assert message.endswith("and 1.")
    assert PlainWidth().allocate(made, NOTHING, prices, lowest) == least
    refusal(made, prices, lowest - 0.0011)
    refusal(made, prices, (floor - 1) / whole)
    assert PlainWidth().allocate(made, NOTHING, prices, 1.0) == with_width(made, 250)


def test_a_cache_that_no_width_changes_is_out_of_reach():
    made = units()
    prices = counted(made, "cache", 2)
    assert "no size that may change here changes the bytes of KV" in refusal(made, prices, 0.9)
    assert PlainWidth().allocate(made, NOTHING, prices, 1.0) == with_width(made, 90)
