"""Scores made once: right for one removal, and one update for all that goes."""

import pytest
import torch

from secateur.linalg.least_squares import damped
from secateur.methods.obspa import OBSPA
from secateur.methods.ziplm import ZipLM
from tests.support.raw import activations, gram_of, lost, normal, solved, spelled


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ridge", [1e-6, 0.05])
def test_the_first_channel_to_go_is_that_of_sequential_obs(seed, ridge):
    x, w = activations(seed, 80, 10), normal(seed + 2, 10, 4)
    one, other = solved(OBSPA(ridge=ridge), x, w).at(9), solved(ZipLM(ridge=ridge), x, w).at(9)
    assert one.keep.tolist() == other.keep.tolist()
    torch.testing.assert_close(one.consumer, other.consumer)


def test_scores_are_what_each_removal_alone_costs():
    """By brute force over refits; the mistake: H_jj in place of 1 / [H⁻¹]_jj."""
    x, w = activations(3, 200, 8), normal(4, 8, 4)
    x[:, 5] = x[:, 1] - x[:, 2] + 0.01 * normal(5, 200)  # loud, but others can stand in for it
    w[5] *= 3
    hessian, costs = damped(gram_of(x), 1e-4), []
    for j in range(8):
        left = [i for i in range(8) if i != j]
        change = w.clone()
        change[left] -= torch.linalg.solve(hessian[left][:, left], hessian[left] @ w)
        costs.append(float((change * (hessian @ change)).sum()))
    solution = solved(OBSPA(ridge=1e-4), x, w)
    ranked = sorted(range(8), key=costs.__getitem__, reverse=True)
    for size in range(9):
        assert solution.at(size).keep.tolist() == sorted(ranked[:size])
    loud = hessian.diagonal() * w.square().sum(1)
    assert int(loud.argmin()) != ranked[-1]


def test_scores_of_a_head_are_summed_over_its_coordinates():
    """Of all query heads that read it; [H⁻¹]_jj is that of all heads together."""
    x, w = activations(7, 150, 12), normal(8, 12, 4)
    x[:, 3:6] = x[:, 0:3] + 0.05 * normal(9, 150, 3)
    inverse = torch.linalg.inv(damped(gram_of(x), 0.01))
    scores = (w.square().sum(1) / inverse.diagonal()).view(4, 3).sum(1)
    ranked = scores.argsort(descending=True).tolist()
    solution = solved(OBSPA(), x, w, 3)
    for size in range(5):
        assert solution.at(size).keep.tolist() == sorted(ranked[:size])


@pytest.mark.parametrize("width", [1, 3])
def test_the_consumer_gets_the_update_of_all_that_goes(width):
    """The mistake: an update for each removal alone, summed up as if they did not meet."""
    x, w = activations(0, 90, 12), normal(1, 12, 4)
    inverse = torch.linalg.inv(damped(gram_of(x), 0.01))
    solution = solved(OBSPA(), x, w, width)
    for size in range(1, 12 // width):
        keep = solution.at(size).keep.tolist()
        stay = spelled(keep, width)
        gone = [i for i in range(12) if i not in stay]
        cross, pivot = inverse[stay][:, gone], inverse[gone][:, gone]
        expected = w[stay] - cross @ torch.linalg.solve(pivot, w[gone])
        torch.testing.assert_close(solution.at(size).consumer, expected)


@pytest.mark.parametrize("seed", range(3))
def test_twins_go_together_and_sequential_obs_is_better(seed):
    """What the method is known for: not a fault of this code."""
    x = activations(seed, 80, 9)
    x[:, 2] = 3 * normal(seed + 3, 80)
    x[:, 6] = x[:, 2] + 0.01 * normal(seed + 4, 80)
    w = normal(seed + 2, 9, 3)
    once, again = (solved(kind(ridge=1e-8), x, w).at(7) for kind in (OBSPA, ZipLM))
    assert not {2, 6} & set(once.keep.tolist())
    assert lost(x, w, once) > 10 * lost(x, w, again)
