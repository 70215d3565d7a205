"""Kept channels, refit and leverage, against least squares, definitions and brute force."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.linalg.least_squares import (
    DampingWarning,
    damped_cholesky,
    decoder,
    nested_errors,
    ridge_leverage,
)

seeds = st.integers(0, 2**31 - 1)


def activations(seed, tokens, channels):
    """Correlated channels of unequal energy."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, channels, generator=generator, dtype=torch.float64)
    mixed = mixed + mixed.roll(1, 1) * torch.rand(channels, generator=generator).double()
    return mixed * (0.2 + 2 * torch.rand(channels, generator=generator).double())


def weights(seed, channels, outputs):
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(channels, outputs, generator=generator, dtype=torch.float64)


def gram_of(x):
    return x.t() @ x / len(x)


def direct_error(x, w, keep):
    """E(S) by least squares on the raw tokens."""
    target, kept = x @ w, x[:, keep]
    solution = torch.linalg.lstsq(kept, target, driver="gelsd").solution
    return float((target - kept @ solution).square().sum() / len(x))


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(2, 12), st.integers(1, 6), st.data())
def test_refit_is_least_squares_on_raw_activations(seed, channels, outputs, data):
    x, w = activations(seed, 60, channels), weights(seed, channels, outputs)
    size = data.draw(st.integers(1, channels))
    keep = torch.randperm(channels, generator=torch.Generator().manual_seed(seed))[:size]
    expected = torch.linalg.lstsq(x[:, keep], x @ w).solution
    found = decoder(gram_of(x), keep, 0.0) @ w
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-7)
    assert size == channels or not torch.allclose(w[keep], expected, atol=1e-3)


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(2, 12), st.integers(1, 6))
def test_error_curve_is_the_direct_error_of_every_prefix(seed, channels, outputs):
    x, w = activations(seed, 60, channels), weights(seed, channels, outputs)
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(seed))
    errors = nested_errors(gram_of(x), w, order, 0.0)
    assert len(errors) == channels + 1
    assert float(errors[0]) == pytest.approx(float((x @ w).square().sum() / len(x)))
    for size in range(1, channels + 1):
        expected = direct_error(x, w, order[:size])
        assert float(errors[size]) == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert bool((errors[1:] <= errors[:-1] + 1e-12).all())


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(2, 12), st.floats(1e-6, 10))
def test_leverage_is_its_definition(seed, channels, ridge):
    gram = gram_of(activations(seed, 60, channels))
    damping = ridge * gram.diagonal().mean() * torch.eye(channels).double()
    expected = (gram @ torch.linalg.inv(gram + damping)).diagonal()
    torch.testing.assert_close(ridge_leverage(gram, ridge), expected, atol=1e-9, rtol=1e-7)


def test_leverage_ranks_by_the_unexplained_then_by_energy():
    gram = gram_of(activations(3, 200, 10))
    unexplained = 1 / torch.linalg.inv(gram).diagonal()
    energy = gram.diagonal()
    assert not torch.equal(unexplained.argsort(), energy.argsort())
    assert torch.equal(ridge_leverage(gram, 1e-7).argsort(), unexplained.argsort())
    assert torch.equal(ridge_leverage(gram, 1e5).argsort(), energy.argsort())


@pytest.mark.parametrize("seed", range(3))
def test_leverage_lies_between_the_best_and_the_typical_subset(seed):
    """Seven independent channels, and three quiet ones that they nearly explain."""
    generator = torch.Generator().manual_seed(seed)
    free = torch.randn(300, 7, generator=generator).double()
    mix = torch.randn(7, 3, generator=generator).double() * 0.1
    rest = free @ mix + 0.02 * torch.randn(300, 3, generator=generator).double()
    order = torch.randperm(10, generator=generator)
    x, w = torch.cat((free, rest), 1)[:, order], weights(seed, 10, 4)
    gram = gram_of(x)
    chosen = ridge_leverage(gram, 1e-3).argsort(descending=True)
    for size in (7, 8):
        every = [
            float(nested_errors(gram, w, torch.tensor([*s, *set(range(10)) - set(s)]), 0.0)[size])
            for s in combinations(range(10), size)
        ]
        own = float(nested_errors(gram, w, chosen, 0.0)[size])
        assert min(every) - 1e-9 <= own < sum(every) / len(every)
        assert own < 0.5 * max(every)


def test_planted_duplicate_is_dropped():
    """The mistake: ranking by energy keeps both of two equal loud channels."""
    x = activations(0, 200, 8)
    x[:, 3] = 5 * x[:, 3]
    x[:, 6] = x[:, 3]
    order = ridge_leverage(gram_of(x), 1e-3).argsort(descending=True).tolist()
    energy = gram_of(x).diagonal().argsort(descending=True).tolist()
    assert {3, 6} == set(energy[:2])
    assert {order.index(3), order.index(6)} & {6, 7}


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(2, 10))
def test_leverage_follows_a_permutation(seed, channels):
    gram = gram_of(activations(seed, 50, channels))
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(seed))
    expected = ridge_leverage(gram, 1e-3)[order]
    torch.testing.assert_close(ridge_leverage(gram[order][:, order], 1e-3), expected)


def test_dead_channels_cost_nothing():
    """Channels that calibration never saw alive, alone and all together."""
    x, w = activations(0, 50, 6), weights(0, 6, 3)
    x[:, [1, 4]] = 0
    keep = torch.tensor([0, 1, 2, 3])
    refit = decoder(gram_of(x), keep, 1e-6)
    assert bool(refit.isfinite().all())
    error = (x @ w - x[:, keep] @ (refit @ w)).square().mean()
    assert float(error) == pytest.approx(direct_error(x, w, [0, 2, 3]) / 3, rel=1e-4)
    silent = torch.zeros(6, 6).double()
    assert bool(decoder(silent, keep, 1e-6).isfinite().all())
    assert bool((nested_errors(silent, w, torch.arange(6), 1e-6) < 1e-200).all())


def test_dead_channels_have_no_leverage():
    x = activations(0, 50, 6)
    x[:, 2] = 0
    assert float(ridge_leverage(gram_of(x), 1e-3)[2]) == pytest.approx(0, abs=1e-12)
    assert bool((ridge_leverage(torch.zeros(4, 4).double(), 1e-3) == 0).all())


def test_ridge_is_raised_until_a_factor_exists_and_says_so():
    x = activations(0, 50, 6)
    gram = gram_of(x)
    values, vectors = torch.linalg.eigh(gram)
    values[0] = -1e-7 * gram.diagonal().mean()  # as summing in float32 leaves it
    gram = vectors * values @ vectors.mT
    with pytest.warns(DampingWarning, match="raised"):
        _, used = damped_cholesky(gram, 1e-14, "test")
    assert 1e-7 < used < 1e-5
    with pytest.raises(ValueError, match="semidefinite"):
        damped_cholesky(-gram, 1e-6, "test")
