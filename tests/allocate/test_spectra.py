"""Allocations that read weights alone: tails of spectra, and singular values above a threshold."""

import math
import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.allocate.alpha import NO_TAIL, AlphaPruning, hill
from secateur.allocate.base import Evidence
from secateur.allocate.farms import FARMS, windows
from secateur.allocate.welore import WeLore, kept, normalised
from secateur.linalg.least_squares import energies
from secateur.structure.costs import counted
from tests.support.made import mlp, query_key, value_output


def noise(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def pareto(alpha, count):
    """Numbers above 1 with density (α − 1) x^−α, one at every quantile."""
    ranks = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return ((1 - ranks) ** (-1 / (alpha - 1))).flip(0)


def hump():
    """A power law with a hump that disturbs a tail the more the nearer to it that begins.

    The histogram has its peak there, and the hump goes on beyond that bin."""
    return torch.cat((pareto(1.1, 1000), torch.linspace(6.5, 7.4, 300).double().exp()))


@pytest.mark.parametrize("alpha", [1.5, 2.0, 3.0, 4.5])
@pytest.mark.parametrize("count", [300, 3000])
def test_pareto_samples_give_their_exponent(alpha, count):
    assert hill(pareto(alpha, count)) == pytest.approx(alpha, rel=0.05)


def test_the_tail_begins_where_the_power_law_does():
    """A body below the law, as spectra have it; the mistake: a tail of all eigenvalues."""
    body = torch.rand(3000, generator=torch.Generator().manual_seed(0)).double()
    spectrum = torch.cat((body[body > 0.05], pareto(2.5, 1000)))
    logs = (spectrum / spectrum.min()).log()
    assert 1 + len(logs) / float(logs.sum()) < 1.5
    assert hill(spectrum) == pytest.approx(2.5, abs=0.35)


@pytest.mark.parametrize("factor", [1e-7, 1e-3, 0.3, 40.0, 1e5])
def test_exponents_do_not_depend_on_scale(factor):
    """The mistake: bounds of which one is a logarithm and the other is not."""
    for spectrum in (energies(noise(96, 160)), pareto(2.5, 700), hump()):
        assert hill(factor * spectrum) == pytest.approx(hill(spectrum), rel=1e-6)


@pytest.mark.parametrize("spectrum", [energies(noise(150, 220, seed=4)), hump(), 1e-3 * hump()])
def test_exponent_is_that_of_the_closest_tail(spectrum):
    """By brute force over all tails that may begin near the peak.

    The mistake: log10 of the lower bound, so that a tail may begin far below the hump."""
    spectrum = spectrum.sort().values
    logs = spectrum.log()
    bins = math.ceil(2 * len(logs) ** (1 / 3))
    edges = torch.linspace(float(logs[0]), float(logs[-1]), bins + 1, dtype=torch.float64)
    counts = [int(((logs >= a) & (logs < b)).sum()) for a, b in pairwise(edges)]
    left, right = edges[counts.index(max(counts))].exp(), edges[counts.index(max(counts)) + 1].exp()
    best = (math.inf, 0.0)
    for k, start in enumerate(spectrum[: len(spectrum) - math.isqrt(len(spectrum)) + 1]):
        if not 0.95 * left <= start <= max(1.5 * left, right):
            continue
        tail = spectrum[k:]
        alpha = 1 + len(tail) / float((tail / start).log().sum())
        law = 1 - (tail / start) ** (1 - alpha)
        distance = float((law - torch.arange(len(tail)) / len(tail)).abs().max())
        best = min(best, (distance, alpha))
    assert hill(spectrum) == pytest.approx(best[1], rel=1e-9)


def test_spectra_without_a_tail_stay_finite():
    for flat in (torch.ones(64), torch.zeros(64), torch.tensor([1.0, 2.0]), torch.empty(0)):
        assert hill(flat.double()) == NO_TAIL
    low_rank = noise(64, 3) @ noise(3, 64, seed=1)
    assert int((energies(low_rank) > 0).sum()) == 3
    assert math.isfinite(hill(energies(low_rank)))


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_energies_are_squared_singular_values(shape):
    weight = noise(*shape)
    expected = torch.linalg.svdvals(weight).square().flip(0)
    assert torch.allclose(energies(weight), expected, rtol=1e-9)


@pytest.mark.parametrize(("shape", "most"), [((7, 17), 5), ((16, 4), 9), ((5, 5), 9), ((9, 3), 2)])
def test_windows_are_square_and_cover_the_matrix(shape, most):
    numbers = torch.arange(math.prod(shape)).view(shape)
    found = list(windows(numbers, most))
    side = min(most, *shape)
    assert all(window.shape == (side, side) for window in found)
    assert set(torch.cat([w.flatten() for w in found]).tolist()) == set(numbers.flatten().tolist())
    assert len(found) == math.prod(math.ceil(length / side) for length in shape)


def test_the_shape_of_noise_has_a_say_only_without_windows():
    """Same noise, other aspect ratios: heavy tails must not come or go with the shape."""

    def mean(allocator, *shape):
        found = [hill(allocator.spectrum(noise(*shape, seed=s))) for s in range(6)]
        return sum(found) / len(found)

    shapes = ((256, 256), (32, 2048), (2048, 32))  # as many entries and windows
    plain = [mean(AlphaPruning(), *shape) for shape in shapes]
    square = [mean(FARMS(window=32), *shape) for shape in shapes]
    assert min(plain[1:]) > 2 * plain[0]
    assert max(square) < 1.4 * min(square)


def test_reading_is_the_mean_over_all_matrices(opened):
    block = opened("llama").blocks[1]
    attention, m = block.attention.module, block.module.mlp
    linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    linears += [m.gate_proj, m.up_proj, m.down_proj]
    expected = [hill(torch.linalg.svdvals(x.weight.double()).square()) for x in linears]
    assert AlphaPruning().read(block, {}) == pytest.approx((sum(expected) / 7,), rel=1e-6)
    assert FARMS(window=8).reading != FARMS(window=9).reading


exponents = st.lists(st.floats(1.1, 30), min_size=1, max_size=10)


@settings(max_examples=200, deadline=None)
@given(exponents, st.floats(0, 0.99), st.floats(0, 1), st.randoms())
def test_ratios_add_up_to_the_budget_even_where_they_are_capped(exponents, spread, wanted, rng):
    weights = [rng.randint(1, 1000) for _ in exponents]
    found = AlphaPruning(spread=spread).sparsities(exponents, weights, wanted)
    mean = math.fsum(w * p for w, p in zip(weights, found, strict=True)) / sum(weights)
    assert mean == pytest.approx(wanted, abs=1e-12)
    assert all(0 <= p <= 1 + 1e-12 for p in found)
    for a, p in zip(exponents, found, strict=True):  # lighter tails lose more
        assert all(p >= q - 1e-12 for b, q in zip(exponents, found, strict=True) if a > b)


def test_ratios_are_affine_in_the_exponent_up_to_the_cap():
    """The mistake: what is above the cap is cut off, and the model stays too large."""
    found = AlphaPruning(spread=0.2).sparsities([2.0, 3.0, 6.0], [1, 2, 1], 0.3)
    ratios = [0.8, 0.9, 1.2]
    level = 0.3 * 4 / (0.8 + 2 * 0.9 + 1.2)
    assert found == pytest.approx([level * r for r in ratios])
    capped = AlphaPruning(spread=0.5).sparsities([2.0, 3.0, 6.0], [1, 1, 1], 0.8)
    ratios = [0.5, 0.75, 1.5]
    cut = [min(1.0, 0.8 * 3 / sum(ratios) * r) for r in ratios]
    assert sum(cut) < 0.8 * 3 - 0.1
    assert capped == pytest.approx([1.4 * 0.4, 1.4 * 0.6, 1.0])


def test_normalised_singular_values():
    assert torch.equal(normalised(torch.tensor([2.0, 3.0, 6.0])), torch.tensor([0.0, 0.25, 1.0]))
    assert torch.equal(normalised(torch.ones(4)), torch.ones(4))  # nothing to spare
    assert torch.equal(normalised(torch.zeros(4)), torch.ones(4))


def spectra(rng, blocks, entries=(512, 512, 512, 512, 1024, 1024, 1024)):
    """Readings of blocks with seven matrices of 16 rows."""
    readings = []
    for _ in range(blocks):
        found = []
        for size in entries:
            values = sorted(rng.random() ** rng.choice([1, 2, 4]) for _ in range(16))
            found += [size, 16, *values]
        readings.append(tuple(found))
    return readings


def units(blocks):
    return [
        unit
        for i in range(blocks)
        for unit in (mlp(i, 64, 1), query_key(i, 16), value_output(i, 16))
    ]


@pytest.mark.parametrize("keep", [0.1, 0.45, 0.8, 0.97])
@pytest.mark.parametrize("seed", range(3))
def test_the_threshold_spends_the_budget(seed, keep):
    """To the singular value: with the next lower threshold it would be overspent."""
    made, readings = units(2), spectra(random.Random(seed), 2)
    prices = counted(made, "parameters", 2)
    shares = WeLore().shares(made, Evidence({}, readings), prices, keep)
    values = sorted({v for reading in readings for v in values_of(reading)})
    whole = sum(prices.of(unit, unit.size) for unit in made)

    def spent(threshold):
        return sum(prices.of(u, u.size) * share_of(u, readings, threshold) for u in made)

    first = next(t for t in (*values, 2.0) if spent(t) <= keep * whole)
    assert shares == pytest.approx({u.name: share_of(u, readings, first) for u in made})
    sizes = WeLore().allocate(made, Evidence({}, readings), prices, keep)
    assert 0 <= keep * whole - prices.spent(made, sizes) < 48 + 1e-6  # one channel


def values_of(reading):
    return [v for i in range(7) for v in reading[18 * i + 2 : 18 * i + 18]]


def share_of(unit, readings, threshold):
    own = {"query_key": range(2), "value_output": range(2, 4), "mlp": range(4, 7)}[unit.kind]
    reading, above, entries = readings[unit.block], 0.0, 0
    for i in own:
        values = reading[18 * i + 2 : 18 * i + 18]
        above += reading[18 * i] * sum(v >= threshold for v in values) / 16
        entries += reading[18 * i]
    return above / entries


def test_matrices_count_by_their_entries():
    """The mistake: a mean of ranks, which is no share of the parameters."""
    wide, narrow = (900, (0.1, 0.2, 0.3, 0.9)), (100, (0.6, 0.7))
    assert kept([wide, narrow], 0.5) == pytest.approx(0.9 * 0.25 + 0.1)
    assert kept([wide, narrow], 0.0) == 1
    assert kept([wide, narrow], 2.0) == 0
    falling = [kept([wide, narrow], k / 50) for k in range(60)]
    assert falling == sorted(falling, reverse=True)


def test_scale_has_no_say_but_an_outlier_has(opened):
    """As published: one large singular value makes the others of its matrix look small."""
    blocks = opened("llama", "float64").blocks
    readings = [WeLore().read(block, {}) for block in blocks]
    with torch.no_grad():
        blocks[0].mlp.consumer.weight.mul_(1000)
        blocks[1].attention.module.q_proj.weight.div_(50)
    again = [WeLore().read(block, {}) for block in blocks]
    assert all(a == pytest.approx(b, abs=1e-6) for a, b in zip(readings, again, strict=True))
    weight = blocks[2].mlp.consumer.weight
    with torch.no_grad():
        weight += 100 * torch.outer(weight[:, 0], weight[0])
    assert sum(WeLore().read(blocks[2], {})) < sum(readings[2]) - 1


def test_all_stays_at_keep_one():
    made, readings = units(2), spectra(random.Random(0), 2)
    prices = counted(made, "parameters", 2)
    assert WeLore().allocate(made, Evidence({}, readings), prices, 1.0) == {
        unit.name: unit.size for unit in made
    }
