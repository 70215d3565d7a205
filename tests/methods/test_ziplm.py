"""Optimal brain surgeon, channel by channel and head by head, against least squares on tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.linalg.least_squares import damped
from secateur.linalg.obs import backward_elimination
from secateur.methods.ziplm import ZipLM
from tests.support.raw import activations, direct_error, gram_of, normal, solved, spelled

seeds = st.integers(0, 2**31 - 1)


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(1, 5), st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_block_errors_are_those_of_the_joint_fit(seed, blocks, width, outputs, own):
    """So Σ scores is the final error, above the error of all coordinates."""
    x = activations(seed, 80, blocks * width)
    t = x @ normal(seed + 2, blocks * width, outputs)
    t = t if own else t + normal(seed + 3, 80, outputs)
    order, errors = backward_elimination(gram_of(x), x.t() @ t / 80, 0.0, width=width)
    assert sorted(order.tolist()) == list(range(blocks))
    assert len(errors) == blocks + 1
    floor = direct_error(x, t, range(blocks * width))
    for size in range(blocks + 1):
        expected = direct_error(x, t, spelled(order[:size].tolist(), width)) - floor
        assert float(errors[size]) == pytest.approx(expected, rel=1e-7, abs=1e-9)


def test_every_block_removal_is_the_cheapest_by_brute_force():
    """The mistake: heads ranked by the diagonal of H⁻¹, as if their coordinates were apart."""
    differs = 0
    for seed in range(4):
        x = activations(seed, 120, 15)
        x[:, 1] = x[:, 0] + 0.1 * x[:, 1]  # a head whose coordinates are nearly one
        t = x @ normal(seed + 2, 15, 3) + normal(seed + 3, 120, 3)
        order, _ = backward_elimination(gram_of(x), x.t() @ t / 120, 0.0, width=3)
        for size in range(5, 0, -1):
            left = order[:size].tolist()
            kept = {j: spelled([i for i in left if i != j], 3) for j in left}
            errors = {j: direct_error(x, t, kept[j]) for j in left}
            assert min(errors, key=errors.__getitem__) == left[-1]
            at = spelled(left, 3)
            inverse = torch.linalg.inv(gram_of(x[:, at]))
            costs = (inverse @ (x[:, at].t() @ t / 120)).square().sum(1) / inverse.diagonal()
            differs += int(costs.view(-1, 3).sum(1).argmin()) != size - 1
    assert differs


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("ridge", [1e-6, 0.01, 0.5])
def test_one_update_after_the_other_ends_in_the_joint_refit(width, ridge):
    """The published loop, spelled out: W, H⁻¹ and the scores are updated at every step."""
    count = 12 // width
    x, w = activations(5, 90, 12), normal(6, 12, 4)
    solution = solved(ZipLM(ridge=ridge), x, w, width)
    hessian = damped(gram_of(x), ridge)
    inverse, weight, left, total = torch.linalg.inv(hessian), w.clone(), list(range(count)), 0.0
    for size in range(count - 1, -1, -1):
        costs = {}
        for j in left:
            own = spelled([j], width)
            pivot = torch.linalg.inv(inverse[own][:, own])
            costs[j] = float((weight[own] * (pivot @ weight[own])).sum())
        gone = min(costs, key=costs.__getitem__)
        own, total = spelled([gone], width), total + costs[gone]
        factor = inverse[:, own] @ torch.linalg.inv(inverse[own][:, own])
        weight = weight - factor @ weight[own]
        inverse = inverse - factor @ inverse[own]
        left.remove(gone)
        found, at = solution.at(size), spelled(left, width)
        assert found.keep.tolist() == left
        torch.testing.assert_close(found.consumer, weight[at], atol=1e-8, rtol=1e-8)
        change = w.clone()
        change[at] -= found.consumer
        assert float((change * (hessian @ change)).sum()) == pytest.approx(total, rel=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_of_twin_heads_one_stays(seed):
    """The mistake: scores that are not computed again, by which both twins look cheap."""
    x = activations(seed, 120, 15)
    x[:, 3:6] = 3 * normal(seed + 3, 120, 3)
    x[:, 9:12] = x[:, 3:6] @ normal(seed + 4, 3, 3) + 0.01 * normal(seed + 5, 120, 3)
    w = normal(seed + 6, 15, 4)
    assert len({1, 3} & set(solved(ZipLM(ridge=1e-8), x, w, 3).at(3).keep.tolist())) == 1


def test_a_channel_that_calibration_never_saw_keeps_its_row():
    """The mistake of the public code: rows of silent channels are set to zero before anything."""
    x, w = activations(0, 90, 6), normal(1, 6, 3)
    x[:, 3] = 0
    w[[0, 1]] *= 1e-4  # these go first
    solution = solved(ZipLM(), x, 10 * w)
    for size in (5, 6):
        narrowing = solution.at(size)
        if 3 in (keep := narrowing.keep.tolist()):
            torch.testing.assert_close(narrowing.consumer[keep.index(3)], 10 * w[3])
    assert 3 in solution.at(5).keep.tolist()
