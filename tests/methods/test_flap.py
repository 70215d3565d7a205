"""FLAP: variances, what a channel's mean leaves to be desired, and biases that keep the mean."""

import pytest
import torch

from secateur.apply.surgery import narrow_unit, narrowed
from secateur.calibration.needs import Needs
from secateur.calibration.statistics import Moments
from secateur.methods.flap import FLAP
from secateur.models.attention import mixed_bias
from secateur.models.loading import skeleton
from secateur.models.model import Settings
from secateur.pipeline.prepare import check_reach
from secateur.planning.planner import tier_of
from secateur.structure.narrowing import Narrowing
from secateur.structure.units import WHOLE_HEADS
from secateur.utils.errors import InputError
from tests.contract.conftest import logits
from tests.support.blocks import axis
from tests.support.families import FAMILIES
from tests.support.steps import step_of

every_family = pytest.mark.parametrize("name", FAMILIES)
some_families = pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "qwen3", "opt"])
every_kind = pytest.mark.parametrize("kind", WHOLE_HEADS)


# Variances


class Aliased(Moments):
    """The mistake of the public code: the old mean of Welford's update is the new one already."""

    def update(self, *values, mask):
        rows = values[0][mask].double()
        if self.total is None:
            self.total, self.tokens = rows.new_zeros(2, rows.shape[1]), 0
        mean = self.total[0]
        before = mean  # no copy
        count = self.tokens + len(rows)
        mean *= self.tokens / count
        mean += rows.sum(0) / count
        if self.tokens:  # and the first batch is left out
            self.total[1] *= self.tokens / count
            self.total[1] += ((rows - mean) * (rows - before)).sum(0) / count
        self.tokens = count

    @property
    def variance(self):
        return self.total[1]


def activations(windows=12, length=7, width=5, seed=0):
    """Coordinates of unequal means and spreads, whose mean drifts from window to window."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(windows, length, width, generator=generator, dtype=torch.float64)
    values = values * (1 + torch.arange(width)) + 10 * torch.arange(width)
    values += torch.linspace(0, 3, windows, dtype=torch.float64).view(-1, 1, 1)
    return values, torch.rand(windows, length, generator=generator) < 0.7


def assert_two_passes(kind):
    values, mask = activations()
    statistic = kind()
    for part in range(0, len(values), 3):
        statistic.update(values[part : part + 3], mask=mask[part : part + 3])
    rows = values[mask]
    expected = (rows - rows.mean(0)).square().mean(0)
    torch.testing.assert_close(statistic.variance, expected, rtol=1e-10, atol=0)


def test_variance_is_that_of_two_passes():
    assert_two_passes(Moments)
    with pytest.raises(AssertionError):
        assert_two_passes(Aliased)


def test_a_large_mean_costs_no_digits():
    """The mistake: sums in float32, of which a small variance is the difference."""
    generator = torch.Generator().manual_seed(0)
    values = 1000 + 0.01 * torch.randn(8, 100, 3, generator=generator)
    mask = torch.ones(8, 100, dtype=torch.bool)
    found = Moments()
    found.update(values, mask=mask)
    rows = values.flatten(0, 1).double()
    expected = rows.var(0, correction=0)
    torch.testing.assert_close(found.variance, expected, rtol=1e-4, atol=0)
    rows = rows.float()
    assert not torch.allclose(rows.square().mean(0) - rows.mean(0) ** 2, expected.float(), rtol=0.5)


def test_merged_moments_are_those_of_all():
    values, mask = activations()
    whole, merged = Moments(), Moments()
    whole.update(values, mask=mask)
    for part in (slice(0, 2), slice(2, 9), slice(9, 12)):
        other = Moments()
        other.update(values[part], mask=mask[part])
        merged.merge(other)
    torch.testing.assert_close(merged.mean, whole.mean)
    torch.testing.assert_close(merged.variance, whole.variance)


# What a channel, or a coordinate of a head, is worth


class Examined:
    """A block of a dense model, its statistics, and what its readers read on their tokens."""

    def __init__(self, opened, calibrated, name):
        data = calibrated(name)
        self.model = opened(name, "float64")
        self.block = self.model.blocks[1]
        self.statistics = data.store.get(1, FLAP.needs)
        self.tokens = data.tokens
        self.seen = {kind: self.read(kind) for kind in WHOLE_HEADS}

    def reader(self, kind):
        return self.block.mlp.consumer if kind == "mlp" else self.block.attention.module.o_proj

    def read(self, kind):
        """(tokens, size, coordinates of each)."""
        seen, shape = [], axis(self.block, kind).read().shape[:2]
        hook = self.reader(kind).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        self.run()
        hook.remove()
        return seen[0].reshape(-1, *shape)

    def given(self, kind):
        """What the reader gives: (tokens, outputs)."""
        seen = []
        reader = self.reader(kind)  # Falcon adds to the output in place
        hook = reader.register_forward_hook(lambda _, __, out: seen.append(out.clone()))
        self.run()
        hook.remove()
        return seen[0].flatten(0, -2)

    def run(self):
        logits(self.model.module, self.tokens)

    def unit(self, kind, biased=True):
        (unit,) = self.block.units(4, (kind,), biased)
        return unit


@pytest.fixture
def examined(opened, calibrated):
    return lambda name: Examined(opened, calibrated, name)


@some_families
def test_a_channel_replaced_by_its_mean_errs_by_its_score(examined, name):
    """Equation 5, with everything that is read but one channel left as it is."""
    one, made = examined(name), FLAP()
    unit, before = one.unit("mlp"), one.given("mlp")
    scores = made.scores(unit, one.block, one.statistics)
    assert torch.equal(made.errors(unit, one.block, one.statistics), scores)
    for channel in (0, 17, int(scores.argmax()), int(scores.argmin())):
        keep = torch.tensor([i for i in range(unit.size) if i != channel])
        bias = made.bias(unit, one.block, one.statistics, torch.tensor([channel]))
        with narrowed(one.block, unit, Narrowing(keep=keep, bias=bias)):
            error = (one.given("mlp") - before).square().sum(1).mean()
        torch.testing.assert_close(error, scores[channel], rtol=1e-5, atol=1e-12)


@some_families
def test_a_head_scores_by_the_squares_of_its_coordinates(examined, name):
    """As published; what it is predicted to cost is their plain sum."""
    one, made = examined(name), FLAP()
    unit, seen, rows = one.unit("heads"), one.seen["heads"], axis(one.block, "heads").read()
    centred = seen - seen.mean(0)
    each = torch.einsum("tkc,kco->tkco", centred, rows).square().sum(3).mean(0)  # (heads, coord.)
    errors = made.errors(unit, one.block, one.statistics)
    torch.testing.assert_close(errors, each.sum(1), rtol=1e-6, atol=1e-12)
    scores = made.scores(unit, one.block, one.statistics)
    torch.testing.assert_close(scores, each.square().sum(1), rtol=1e-6, atol=1e-12)


def test_a_constant_channel_costs_nothing_however_large_it_is(examined):
    """The mistake: Wanda's score, by which it would be the first to stay."""
    one, made = examined("llama"), FLAP()
    unit, statistic = one.unit("mlp"), one.statistics[Needs.HIDDEN_MOMENTS]
    total = statistic.total.clone()
    total[:, 5] = statistic.tokens * torch.tensor([1000.0, 1e6], dtype=torch.float64)
    statistics = {**one.statistics, Needs.HIDDEN_MOMENTS: Moments(total, statistic.tokens)}
    assert 5 not in made.solve(unit, one.block, statistics).at(unit.size - 1).keep
    assert made.scores(unit, one.block, statistics)[5] == 0


# What takes the place of what is gone


@every_kind
@some_families
def test_no_constant_is_better_than_the_bias(examined, name, kind):
    one, made = examined(name), FLAP()
    unit, seen, rows = one.unit(kind), one.seen[kind], axis(one.block, kind).read()
    keep = made.solve(unit, one.block, one.statistics).at(unit.size // 2).keep.tolist()
    gone = torch.tensor([i for i in range(unit.size) if i not in keep])
    bias = made.solve(unit, one.block, one.statistics).at(unit.size // 2).bias
    lost = seen[:, gone].flatten(1) @ rows[gone].flatten(0, 1)

    def error(constant):
        return float((lost - constant).square().sum(1).mean())

    generator = torch.Generator().manual_seed(0)
    for length in (1e-1, 1e-2, -1e-2):
        step = length * torch.randn(len(bias), generator=generator).double()
        expected = error(bias) + float(step.square().sum())  # a parabola with its foot there
        assert error(bias + step) == pytest.approx(expected, rel=1e-6)
    assert error(bias) < error(torch.zeros_like(bias))


@every_kind
@every_family
def test_the_mean_output_stays_whatever_goes(examined, name, kind):
    """Of all families. The mistake where values have a bias: leaving it out of the mean, as the
    statistics do."""
    one, made = examined(name), FLAP()
    unit, block = one.unit(kind), one.block
    if unit.fixed:
        assert "heads" in block.attention.views["heads"].obstacle
        return
    if kind == "heads" and block.attention.module.v_proj.bias is not None:
        block.attention.module.v_proj.bias.mul_(30)  # what heads mix is kept without it
    before = one.given(kind).mean(0)
    solution = made.solve(unit, block, one.statistics)
    for size in (0, unit.size // 2):
        with narrowed(block, unit, solution.at(size)):
            after = one.given(kind)
        torch.testing.assert_close(after.mean(0), before, rtol=1e-6, atol=1e-6)
        assert size or float(after.std(0).max()) < 1e-9


@pytest.mark.parametrize("name", ["qwen2", "opt", "gpt2", "llama_biased_tied"])
def test_without_the_value_bias_the_mean_moves(examined, name):
    """What the test above would find."""
    one, made = examined(name), FLAP()
    unit, block = one.unit("heads"), one.block
    bias = made.bias(unit, block, one.statistics, torch.arange(unit.size))
    own = mixed_bias(block.attention.module) @ block.attention.output_rows.flatten(0, 1)
    assert float(own.norm()) > 0.1
    before = one.given("heads").mean(0)
    narrow_unit(block, unit, Narrowing(keep=torch.arange(0), bias=bias - own))
    torch.testing.assert_close(one.given("heads").mean(0), before - own)


@every_kind
def test_nothing_makes_up_for_it_unless_asked_to(examined, kind):
    one, made = examined("llama"), FLAP(compensate=0)
    unit = one.unit(kind, made.biased)
    assert not unit.new_bias
    assert one.unit(kind, FLAP().biased).new_bias
    with_bias = FLAP().solve(unit, one.block, one.statistics)
    without = made.solve(unit, one.block, one.statistics)
    assert without.at(1).bias is None
    assert with_bias.at(1).bias is not None
    assert torch.equal(with_bias.at(1).keep, without.at(1).keep)
    assert with_bias.curve == without.curve


# Stock classes


def test_a_new_bias_is_nothing_for_stock_classes(opened):
    for name, biased, expected in (
        ("llama", True, "per-layer"),
        ("llama", False, "plain"),
        ("gpt2", True, "plain"),  # has biases anyway
    ):
        units = opened(name).units(8, WHOLE_HEADS, biased)
        sizes = {unit.name: 40 if unit.kind == "mlp" else unit.size for unit in units}
        assert tier_of(units, sizes) == expected
        assert tier_of(units, {unit.name: unit.size for unit in units}) == "plain"


@pytest.mark.parametrize("target", ["parameters", "latency"])
def test_the_plain_tier_refuses_biases_before_any_weight_is_read(dense, target):
    given = {"target": target, "tier": "plain", "length": 32}
    made, stock = FLAP(), FLAP(compensate=0)
    shapes = skeleton(str(dense("llama")), Settings())
    with pytest.raises(InputError, match=r"flap.*--compensate 0.*per-layer"):
        check_reach(shapes, step_of(made, **given))
    check_reach(shapes, step_of(stock, **given))
    check_reach(shapes, step_of(made, target=target, length=32))
    biased = skeleton(str(dense("gpt2")), Settings())
    check_reach(biased, step_of(made, **given))
