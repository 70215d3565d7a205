"""Sparse recovery of an output: planted supports, residuals, and what rescaling may not change."""

from itertools import pairwise

import pytest
import torch

from secateur.methods.ispasp import ISpaSP
from secateur.utils.errors import InputError
from tests.support.raw import activations, direct_error, gram_of, lost, normal, solved, spelled

RANGES = [(1, 20, 4), (3, 8, 3)]  # width, units, support


def planted(seed, width, count, size):
    """Which of the units make the output."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator)[:size].sort().values.tolist()


@pytest.mark.parametrize("refit", [0, 1])
@pytest.mark.parametrize(("width", "count", "size"), RANGES)
@pytest.mark.parametrize("seed", range(3))
def test_a_support_that_alone_is_active_is_found(seed, width, count, size, refit):
    own, x = planted(seed, width, count, size), torch.zeros(90, count * width).double()
    x[:, spelled(own, width)] = normal(seed + 1, 90, size * width)
    w = normal(seed + 2, count * width, 5)
    solution = solved(ISpaSP(refit=refit), x, w, width)
    assert solution.at(size).keep.tolist() == own
    assert lost(x, w, solution.at(size), width) < 1e-18


@pytest.mark.parametrize(("width", "count", "size"), RANGES)
@pytest.mark.parametrize("seed", range(3))
def test_a_support_that_alone_is_read_is_found(seed, width, count, size):
    """The mistake: cutting by what is active, whoever reads it."""
    own, x = planted(seed, width, count, size), activations(seed, 90, count * width)
    w, other = normal(seed + 2, count * width, 5), [i for i in range(count) if i not in own]
    w[spelled(other, width)] = 0
    x[:, spelled(other, width)] *= 10
    assert solved(ISpaSP(), x, w, width).at(size).keep.tolist() == own


def test_activations_that_change_their_sign_count():
    """The mistake of the public code, made for ReLU: sums over tokens of signed numbers.

    Its importance Σ_b (V Wᵀ)_bj and its size Σ_b x_bj both vanish for whatever has mean zero.
    """
    x = torch.zeros(80, 12).double()
    own = [1, 4, 10]
    x[:, own] = normal(0, 80, 3)
    x[:, own] -= x[:, own].mean(0)
    x[:, [0, 2, 3]] = 1e-3  # positive, and next to nothing
    w = normal(1, 12, 5)
    assert solved(ISpaSP(), x, w).at(3).keep.tolist() == own
    published = x.sum(0).argsort(descending=True)[:3].sort().values.tolist()
    assert published == [0, 2, 3]


@pytest.mark.parametrize("width", [1, 3])
def test_loud_units_that_cancel_each_other_are_not_taken(width):
    """Importance looks at the whole residual; energies alone would take both."""
    count = 10
    x = torch.linalg.qr(normal(0, 90, count * width)).Q
    w, a, b = normal(1, count * width, 4), spelled([3], width), spelled([7], width)
    x[:, a] *= 20
    x[:, b], w[b] = -x[:, a], w[a]
    loud = (gram_of(x).diagonal() * w.square().sum(1)).view(-1, width).sum(1)
    assert set(loud.argsort(descending=True)[:2].tolist()) == {3, 7}
    solution = solved(ISpaSP(), x, w, width)
    for size in (1, 2, 3):
        assert not {3, 7} & set(solution.at(size).keep.tolist())


@pytest.mark.parametrize("refit", [0, 1])
@pytest.mark.parametrize("width", [1, 3])
def test_the_residual_never_rises_with_iterations(width, refit):
    """The mistake: keeping the last set, which may be worse than one before it."""
    fell = False
    for seed in range(5):
        x = normal(seed, 120, 5) @ normal(seed + 1, 5, 16 * width)
        x, w = x + 0.3 * normal(seed + 2, *x.shape), normal(seed + 3, 16 * width, 3)
        for size in (3, 5):
            found = [
                solved(ISpaSP(iterations=n, refit=refit, ridge=1e-9), x, w, width).at(size)
                for n in (1, 2, 4, 20)
            ]
            errors = [lost(x, w, narrowing, width) for narrowing in found]
            assert all(a >= b * (1 - 1e-9) for a, b in pairwise(errors))
            fell |= errors[-1] < 0.95 * errors[0]
    assert fell


@pytest.mark.parametrize("width", [1, 2])
def test_with_a_refit_the_rows_are_least_squares(width):
    x, w = activations(3, 120, 12 * width), normal(4, 12 * width, 4)
    solution = solved(ISpaSP(refit=1, ridge=1e-10), x, w, width)
    for size in (2, 5, 9):
        narrowing = solution.at(size)
        at = spelled(narrowing.keep.tolist(), width)
        assert lost(x, w, narrowing, width) == pytest.approx(direct_error(x, x @ w, at), rel=1e-6)
    assert solved(ISpaSP(), x, w, width).at(5).consumer is None


@pytest.mark.parametrize("refit", [0, 1])
@pytest.mark.parametrize(("width", "count"), [(1, 14), (3, 6), (1, 37)])
def test_curve_is_the_error_on_the_activations(width, count, refit):
    """Of every unit where there are few; at some sizes, and between them in between, elsewhere."""
    x, w = activations(5, 150, count * width), normal(6, count * width, 4)
    solution = solved(ISpaSP(refit=refit), x, w, width)
    whole = float((x @ w).square().sum() / len(x))
    step = -(-count // 16)
    for size in range(0, count, step):
        share = lost(x, w, solution.at(size), width) / whole
        above = [lost(x, w, solution.at(k), width) / whole for k in range(size, count, step)]
        assert solution.curve.at(size) == pytest.approx(min(1, max(share, *above)), rel=1e-9)
    errors = solution.curve.errors
    assert len(errors) == count + 1
    assert (errors[0], errors[-1]) == (1, 0)
    assert all(a >= b for a, b in pairwise(errors))


@pytest.mark.parametrize("refit", [0, 1])
def test_rescaling_a_channel_and_its_reader_changes_nothing(refit):
    x, w = activations(8, 100, 16), normal(9, 16, 4)
    scale = 10 ** normal(10, 16)
    one = solved(ISpaSP(refit=refit, ridge=0.0), x, w)
    other = solved(ISpaSP(refit=refit, ridge=0.0), x * scale, w / scale.unsqueeze(1))
    for size in range(17):
        assert one.at(size).keep.tolist() == other.at(size).keep.tolist()


def test_from_half_of_the_units_on_it_is_a_ranking_by_energy():
    """Twice as many are merged as stay, so nothing is left out: known, and in the docs."""
    x, w = activations(11, 100, 10), normal(12, 10, 4)
    energies = gram_of(x).diagonal() * w.square().sum(1)
    for size in (5, 7, 9):
        expected = energies.argsort(descending=True)[:size].sort().values.tolist()
        assert solved(ISpaSP(), x, w).at(size).keep.tolist() == expected


@pytest.mark.parametrize("refit", [0, 1])
@pytest.mark.parametrize("wrong", [torch.nan, 1e200])
def test_a_residual_that_is_not_finite_is_refused(wrong, refit):
    """The mistake: it is less than no other, and the empty set is taken for the best of all."""
    x, w = activations(13, 60, 12), normal(14, 12, 4)
    w[3, 1] = wrong
    with pytest.raises(InputError, match=r"^mlp: .*eval"):
        solved(ISpaSP(refit=refit), x, w)
