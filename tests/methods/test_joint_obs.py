"""Backward elimination of MLP channels, against least squares on raw tokens and brute force."""

import warnings
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur import Store, calibrate
from secateur.apply.sequential import watched
from secateur.apply.surgery import narrowed
from secateur.calibration.layer_stream import Stream
from secateur.calibration.needs import Needs
from secateur.calibration.statistics import Cross, Gram
from secateur.data.tokens import Tokens
from secateur.linalg import symmetric
from secateur.linalg.least_squares import DampingWarning, ridge_leverage
from secateur.linalg.obs import PANEL, backward_elimination, survivors
from secateur.methods.joint_obs import JointOBS
from tests.support.families import stream
from tests.support.raw import activations, direct_error, gram_of, normal

seeds = st.integers(0, 2**31 - 1)
RIDGE = 1e-10


def cross_of(x, t):
    return x.t() @ t / len(x)


def solved(x, w, ridge=RIDGE, target=None):
    """The method's answer for activations (tokens, channels) and a consumer."""
    mask = torch.ones(1, len(x), dtype=torch.bool)
    found = {Needs.HIDDEN_GRAM: Gram()}
    found[Needs.HIDDEN_GRAM].update(x[None], mask=mask)
    if target is not None:
        found[Needs.HIDDEN_TARGET] = Cross()
        found[Needs.HIDDEN_TARGET].update(x[None], target[None], mask=mask)
    mlp = SimpleNamespace(consumer_weight=w)
    unit, block = SimpleNamespace(name="mlp"), SimpleNamespace(mlp_of=lambda _: mlp)
    return JointOBS(ridge).solve(unit, block, found)


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(1, 10), st.integers(1, 5), st.booleans())
def test_errors_are_those_of_the_joint_fit_at_every_size(seed, channels, outputs, own):
    """Above the error of all channels, which is zero where the target is the consumer's output."""
    x = activations(seed, 60, channels)
    t = x @ normal(seed + 2, channels, outputs)
    t = t if own else t + normal(seed + 3, 60, outputs)
    order, errors = backward_elimination(gram_of(x), cross_of(x, t), 0.0)
    assert sorted(order.tolist()) == list(range(channels))
    floor = direct_error(x, t, range(channels))
    assert len(errors) == channels + 1
    assert (floor > 1e-3) is not own
    for size in range(channels + 1):
        expected = direct_error(x, t, order[:size]) - floor
        assert float(errors[size]) == pytest.approx(expected, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_every_removal_is_the_cheapest_by_brute_force(seed):
    x = activations(seed, 80, 9)
    t = x @ normal(seed + 2, 9, 3) + normal(seed + 3, 80, 3)
    order, _ = backward_elimination(gram_of(x), cross_of(x, t), 0.0)
    for size in range(9, 0, -1):
        left = order[:size].tolist()
        errors = {j: direct_error(x, t, [i for i in left if i != j]) for j in left}
        assert min(errors, key=errors.__getitem__) == left[-1]


@pytest.mark.parametrize("seed", range(3))
def test_of_twins_one_stays(seed):
    """The mistake: one ranking by ‖Ŵ_j‖² / [H⁻¹]_jj for all sizes, where each twin is cheap."""
    x = activations(seed, 80, 9)
    x[:, 2] = 3 * normal(seed + 3, 80)
    x[:, 6] = x[:, 2] + 0.01 * normal(seed + 4, 80)
    t = x @ normal(seed + 2, 9, 3)
    gram, cross = gram_of(x), cross_of(x, t)
    order, errors = backward_elimination(gram, cross, 0.0)
    costs = torch.linalg.solve(gram, cross).square().sum(1) / torch.linalg.inv(gram).diagonal()
    at_once = costs.argsort(descending=True)
    assert set(at_once[-2:].tolist()) == {2, 6}
    assert len({2, 6} & set(order[-2:].tolist())) == 1
    assert direct_error(x, t, at_once[:7]) > 10 * float(errors[7])


@pytest.mark.parametrize("band", [32, symmetric.BAND])
def test_exact_across_panels_and_bands(band, monkeypatch):
    """Removals are put off, and what is gone is dropped now and then; nothing else may change.

    The mistake: a row of a matrix that is kept above its diagonal, read as if it were whole.
    """
    monkeypatch.setattr(symmetric, "BAND", band)
    size = 300
    assert size > 2 * PANEL
    x = activations(0, 700, size)
    t = x @ normal(2, size, 6) + normal(3, 700, 6)
    gram, cross = gram_of(x), cross_of(x, t)
    order, errors = backward_elimination(gram, cross, 0.0)
    floor = direct_error(x, t, range(size))
    for left in range(size, 0, -1):
        keep = order[:left]
        inverse = torch.linalg.inv(gram[keep][:, keep])
        costs = (inverse @ cross[keep]).square().sum(1) / inverse.diagonal()
        assert int(costs.argmin()) == left - 1
        assert float(errors[left - 1] - errors[left]) == pytest.approx(float(costs[-1]), rel=1e-7)
    edges = (size - PANEL, size - 2 * PANEL)
    for left in (0, 1, *(edge + i for edge in edges for i in (-1, 0, 1)), size):
        expected = direct_error(x, t, order[:left]) - floor
        assert float(errors[left]) == pytest.approx(expected, rel=1e-8, abs=1e-10)


@pytest.mark.parametrize("size", [0, 1, 44, 172, 173, 260, 299, 300])
def test_survivors_are_the_first_of_the_order(size):
    x = activations(0, 700, 300)
    t = x @ normal(2, 300, 6) + normal(3, 700, 6)
    given = gram_of(x), cross_of(x, t), 1e-4
    order, _ = backward_elimination(*given)
    assert survivors(*given, size).tolist() == sorted(order[:size].tolist())


@pytest.mark.parametrize("ridge", [1e-12, 1e-16])
def test_channels_that_are_equal_to_the_last_bit(ridge):
    """Of their inverse only rounding is left, which must not decide, nor become infinite."""
    x = 1e3 * activations(0, 90, 40)
    x = torch.cat((x, x, torch.zeros(90, 3).double()), 1)
    w = normal(1, 83, 4)
    gram = gram_of(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DampingWarning)
        order, errors = backward_elimination(gram, gram @ w, ridge)
    assert sorted(order.tolist()) == list(range(83))
    assert bool(errors.isfinite().all())
    assert float(errors[40]) < 1e-6 * float(errors[0])
    assert {i % 40 for i in order[:40].tolist()} == set(range(40))


def test_what_the_consumer_ignores_and_what_others_explain_go_first():
    """Two channels of each kind, and nothing is lost with those four."""
    x, w = activations(0, 200, 12), normal(1, 12, 5)
    ignored, made = [2, 9], [4, 11]
    w[ignored] = 0
    x[:, 4] = x[:, 0] - 2 * x[:, 1]
    x[:, 11] = 0.5 * x[:, 3] + x[:, 4] + x[:, 5]
    gram = gram_of(x)
    order, errors = backward_elimination(gram, gram @ w, RIDGE)
    first = set(order[-4:].tolist())
    assert first > set(ignored)
    assert first <= {*ignored, *made, 0, 1, 3, 5}
    assert float(errors[8]) < 1e-6 * float(errors[0])
    assert float(errors[7]) > 1e-3 * float(errors[0])
    assert direct_error(x, x @ w, order[:8]) < 1e-12 * float(errors[0])


def test_not_the_order_of_leverages():
    """The mistake: a loud channel that no other explains has leverage, but here no reader."""
    x, w = activations(3, 200, 8), normal(4, 8, 4)
    x[:, 5] = 10 * normal(5, 200)
    w[5] = 0
    gram = gram_of(x)
    order, errors = backward_elimination(gram, gram @ w, RIDGE)
    leverage = ridge_leverage(gram, 1e-3).argsort(descending=True)
    assert int(order[-1]) == 5
    assert int(leverage[0]) == 5
    assert float(errors[7]) < 1e-9 * float(errors[0])
    for size in range(1, 8):
        assert direct_error(x, x @ w, leverage[:size]) > direct_error(x, x @ w, order[:size])


@pytest.mark.parametrize("seed", range(3))
def test_the_best_set_of_every_size_where_channels_are_orthogonal(seed):
    """There the costs do not depend on what else is gone, so greedy is exact."""
    x = torch.linalg.qr(normal(seed, 40, 7)).Q * (0.2 + normal(seed + 100, 7).abs())
    t = x @ normal(seed + 2, 7, 3)
    order, errors = backward_elimination(gram_of(x), cross_of(x, t), 0.0)
    assert not torch.equal(order, gram_of(x).diagonal().argsort(descending=True))
    for size in range(1, 8):
        found = {keep: direct_error(x, t, keep) for keep in combinations(range(7), size)}
        best = min(found, key=found.__getitem__)
        assert set(best) == set(order[:size].tolist())
        assert float(errors[size]) == pytest.approx(found[best], abs=1e-12)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_refit_is_least_squares_on_raw_activations(size):
    """The mistake: leaving the kept channels the rows that they had."""
    x, w = activations(0, 90, 10), normal(1, 10, 4)
    narrowing = solved(x, w).at(size)
    keep = narrowing.keep
    assert keep.tolist() == sorted(set(keep.tolist()))
    expected = torch.linalg.lstsq(x[:, keep], x @ w).solution
    torch.testing.assert_close(narrowing.consumer, expected, atol=1e-7, rtol=1e-7)
    dense_rows = float((x @ w - x[:, keep] @ w[keep]).square().sum() / len(x))
    assert dense_rows > 1.05 * direct_error(x, x @ w, keep)


def test_all_channels_stay_as_they_are_and_none_leave_nothing():
    x, w = activations(0, 90, 10), normal(1, 10, 4)
    solution = solved(x, w, 1e-3)
    torch.testing.assert_close(solution.at(10).consumer, w, atol=1e-12, rtol=1e-12)
    assert solution.at(10).keep.tolist() == list(range(10))
    assert solution.at(0).consumer.shape == (0, 4)
    assert solution.at(0).keep.shape == (0,)


@pytest.mark.parametrize("seed", range(3))
def test_the_fit_is_to_the_target_where_there_is_one(seed):
    """The mistake: selecting and refitting for the consumer's own output all the same."""
    x, w = activations(seed, 90, 10), normal(seed + 4, 10, 4)
    t = x @ normal(seed + 5, 10, 4) * torch.linspace(0.1, 1, 4) + 0.3 * normal(seed + 6, 90, 4)
    right, wrong = solved(x, w, target=t), solved(x, w)
    for size in (3, 6, 10):
        found, other = right.at(size), wrong.at(size)
        expected = torch.linalg.lstsq(x[:, found.keep], t).solution
        torch.testing.assert_close(found.consumer, expected, atol=1e-7, rtol=1e-7)
        missed = float((t - x[:, other.keep] @ other.consumer).square().sum() / 90)
        assert missed > 1.5 * direct_error(x, t, found.keep)
    assert any(right.at(k).keep.tolist() != wrong.at(k).keep.tolist() for k in range(10))


def test_what_only_the_target_needs_is_kept():
    """A channel that the dense consumer ignores, but that makes good what earlier blocks lost."""
    x, w = activations(0, 90, 6), normal(1, 6, 3)
    w[2], x[:, 2] = 0, normal(2, 90)
    t = x @ w + 10 * x[:, 2:3] * normal(3, 1, 3)
    assert 2 not in solved(x, w).at(5).keep.tolist()
    assert 2 in solved(x, w, target=t).at(1).keep.tolist()


@pytest.mark.parametrize("targeted", [False, True])
def test_curve_is_the_error_on_the_activations(targeted):
    x, w = activations(1, 90, 10), normal(2, 10, 4)
    t = x @ w + normal(3, 90, 4) if targeted else x @ w
    solution = solved(x, w, target=t if targeted else None)
    errors = []
    for size in range(11):
        narrowing = solution.at(size)
        found = x[:, narrowing.keep] @ narrowing.consumer
        errors.append(float((t - found).square().sum() / len(x)))
    for size, error in enumerate(errors):
        expected = (error - errors[-1]) / (errors[0] - errors[-1])
        assert solution.curve.at(size) == pytest.approx(expected, abs=1e-8)


def test_a_channel_that_was_never_active_goes_first_and_keeps_its_row():
    """The mistake: a ridge towards zero, which wipes out what calibration text did not need."""
    x, w = activations(0, 90, 6), normal(1, 6, 3)
    x[:, 3] = 0
    solution = solved(x, w, 1e-6)
    assert 3 not in solution.at(5).keep.tolist()
    assert solution.curve.at(5) == pytest.approx(0, abs=1e-9)
    gram, eye = gram_of(x), torch.eye(6).double()
    towards_zero = torch.linalg.solve(gram + 1e-6 * gram.diagonal().mean() * eye, gram @ w)
    assert not bool(towards_zero[3].any())
    torch.testing.assert_close(solution.at(6).consumer[3], w[3])


@pytest.mark.parametrize("name", ["llama", "phi3", "opt", "gpt2"])
def test_curve_is_the_error_that_a_narrowed_mlp_makes(opened, name):
    """On the model: whose bias is no part of what has to be rebuilt."""
    model, ids = opened(name, "float64"), stream(400).view(10, 40)
    tokens, store = Tokens(ids, torch.ones_like(ids, dtype=torch.bool)), Store()
    calibrate(model, tokens, frozenset({Needs.HIDDEN_GRAM}), store)
    block, windows = model.blocks[0], Stream(model, tokens)
    unit = next(u for u in block.units(8) if u.kind == "mlp")
    solution = JointOBS(1e-8).solve(unit, block, store.get(0, [Needs.HIDDEN_GRAM]))

    def output():
        with torch.no_grad(), watched(block) as seen:
            windows.through(block, windows.at(slice(None)))
        return seen.mlp

    dense, bias = output(), getattr(block.mlp.consumer, "bias", None)
    energy = (dense if bias is None else dense - bias).square().sum()
    for size in (8, 24, 48):
        with narrowed(block, unit, solution.at(size)):
            share = float((output() - dense).square().sum() / energy)
        assert solution.curve.at(size) == pytest.approx(share, rel=1e-4, abs=1e-6)
        assert 0 < share < 1
    assert torch.equal(output(), dense)
