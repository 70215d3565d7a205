"""A Gauss-Newton step on an MLP's producers, against explicit Jacobians and dense outputs."""

from itertools import pairwise

import pytest
import torch

from secateur.calibration.token_batches import TokenBatches
from secateur.linalg.least_squares import conjugate_gradients
from secateur.methods import gauss_newton
from secateur.methods.gauss_newton import GaussNewton
from secateur.structure.narrowing import Narrowing
from tests.contract.conftest import logits
from tests.support.families import FAMILIES, HIDDEN, WIDTH, read, seen_by

MLPS = pytest.mark.parametrize("name", ["llama", "phi3", "opt", "gpt2"])


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def judging(tokens):
    """Every eighth run of 32 tokens has no part in the step."""
    return torch.arange(tokens) // 32 % 7 == 6


def made(block, inputs):
    """What the MLP gives, without the consumer's bias."""
    return block.mlp.channels(block.mlp.produced(inputs)) @ block.mlp.consumer_weight


def pieces(inputs, targets, size=4096):
    """In pieces of so many tokens."""
    return TokenBatches(lambda: zip(inputs.split(size), targets.split(size), strict=True))


def error(block, inputs, targets):
    return float((targets - made(block, inputs)).square().sum() / len(inputs))


def weights(block):
    return [weight.clone() for weight in (*block.mlp.producer_weights, block.mlp.consumer_weight)]


def same(block, before):
    return all(map(torch.equal, weights(block), before))


def thinned(block, channels, inputs=None, targets=None):
    """Keep the first channels; the consumer is refitted where there is something to fit."""
    keep = torch.arange(channels)
    block.mlp.axis("mlp").narrow(Narrowing(keep=keep))
    if inputs is not None:
        rows = torch.linalg.lstsq(block.mlp.channels(block.mlp.produced(inputs)), targets).solution
        block.mlp.set_consumer_weight(rows)
    return block


def shaken(block, size, seed=7):
    """Move the producers' weights a little."""
    for i, weight in enumerate(block.mlp.producer_weights):
        weight.data.add_(size * weight.square().mean().sqrt() * normal(seed + i, *weight.shape))


@pytest.mark.parametrize("name", FAMILIES)
def test_produced_and_channels_are_what_the_consumer_reads(opened, name):
    model, given, seen = opened(name, "float64"), read(name, 2, 12), {}
    for block in model.blocks:
        first, _ = block.mlp.producers[0]
        for end, module in (("in", first), ("out", block.mlp.consumer)):
            key = (block.index, end)
            module.register_forward_pre_hook(lambda _, args, key=key: seen.update({key: args[0]}))
    logits(model.module, given)
    for block in model.blocks:
        inputs, expected = (seen[block.index, end].flatten(0, -2) for end in ("in", "out"))
        produced = block.mlp.produced(inputs)
        assert len(produced) == len(block.mlp.producer_weights)
        count = len(given) * seen_by(name, block.index, given)
        assert expected.shape == (count, WIDTH if name != "gpt2" else 4 * HIDDEN)
        torch.testing.assert_close(block.mlp.channels(produced), expected)


@MLPS
def test_producer_weights_are_views_part_by_part(opened, name):
    """Writing to one moves the channels of that part alone, as a plain product."""
    block, inputs = opened(name, "float64").blocks[1], normal(0, 9, HIDDEN)
    for i, weight in enumerate(block.mlp.producer_weights):
        before, change = block.mlp.produced(inputs), normal(i, *weight.shape)
        weight.data.copy_(weight + change)
        after = block.mlp.produced(inputs)
        for j, (old, new) in enumerate(zip(before, after, strict=True)):
            expected = old + inputs @ change if i == j else old
            torch.testing.assert_close(new, expected)


def system(seed, *sizes):
    """A positive definite matrix over parts of these sizes, and a right side."""
    count = sum(sizes)
    factor = normal(seed, count, count)
    matrix, right = factor @ factor.mT + torch.eye(count), normal(seed + 1, count)

    def curved(parts):
        return list((matrix @ torch.cat(parts)).split(sizes))

    return matrix, right, curved


def test_conjugate_gradients_are_exact_after_as_many_steps_as_unknowns():
    matrix, right, curved = system(0, 3, 5)
    exact = torch.linalg.solve(matrix, right)
    residual, lost = list(right.split((3, 5))), []
    for steps in range(9):
        found = torch.cat(conjugate_gradients(curved, lambda r: r, residual, steps))
        missed = found - exact
        lost.append(float(missed @ matrix @ missed))
    assert all(b < a for a, b in pairwise(lost))
    assert lost[7] > 1e-6 * lost[0]
    torch.testing.assert_close(found, exact, rtol=1e-7, atol=1e-7)


def test_a_perfect_preconditioner_needs_one_step():
    matrix, right, curved = system(2, 4, 2)

    def solve(parts):
        return list(torch.linalg.solve(matrix, torch.cat(parts)).split((4, 2)))

    exact = torch.linalg.solve(matrix, right)
    once = torch.cat(conjugate_gradients(curved, solve, list(right.split((4, 2))), 1))
    torch.testing.assert_close(once, exact)
    plain = torch.cat(conjugate_gradients(curved, lambda r: r, list(right.split((4, 2))), 1))
    assert float((plain - exact).norm()) > 0.1 * float(exact.norm())


def test_conjugate_gradients_of_nothing_are_nothing():
    _, right, curved = system(3, 2, 2)
    found = conjugate_gradients(curved, lambda r: r, [torch.zeros(2).double()] * 2, 5)
    assert not any(bool(part.any()) for part in found)
    exact = conjugate_gradients(curved, lambda r: r, list(right.split(2)), 4)
    longer = conjugate_gradients(curved, lambda r: r, list(right.split(2)), 100)
    torch.testing.assert_close(exact, longer, rtol=1e-6, atol=1e-6)


def linearised(block, inputs):
    """Jacobian of the outputs by all producer weights: (outputs, weights)."""
    produced, consumer = block.mlp.produced(inputs), block.mlp.consumer_weight

    def moved(changes):
        parts = [p + inputs @ c for p, c in zip(produced, changes, strict=True)]
        return block.mlp.channels(parts) @ consumer

    nothing = [torch.zeros(w.shape).double() for w in block.mlp.producer_weights]
    parts = torch.func.jacrev(moved)(nothing)
    return torch.cat([part.flatten(0, 1).flatten(1) for part in parts], 1)


def shaped(flat, block):
    """A vector of weights as parts."""
    shapes = [w.shape for w in block.mlp.producer_weights]
    return [
        part.view(shape)
        for part, shape in zip(flat.split([s.numel() for s in shapes]), shapes, strict=True)
    ]


@MLPS
@pytest.mark.parametrize("ridge", [1e-2, 1e-7])
def test_the_step_solves_the_linearised_least_squares(opened, name, ridge):
    """With its ridge, whose metric is that of the preconditioner; nearly without one."""
    block = thinned(opened(name, "float64").blocks[0], 5)
    inputs, targets = normal(0, 50, HIDDEN), normal(1, 50, HIDDEN)
    jacobian = linearised(block, inputs)
    residual = (targets - made(block, inputs)).flatten()
    gram = inputs.t() @ inputs / 50
    gram = gram + ridge * gram.diagonal().mean() * torch.eye(HIDDEN)
    rows, slopes = block.mlp.consumer_weight.square().sum(1), []
    for i, part in enumerate(block.mlp.produced(inputs)):
        others = block.mlp.produced(inputs)
        slope = torch.autograd.functional.jvp(
            lambda p, i=i, others=others: block.mlp.channels([*others[:i], p, *others[i + 1 :]]),
            part,
            torch.ones_like(part),
        )[1]
        slopes.append(rows * slope.square().mean(0))
    penalty = torch.block_diag(*(torch.kron(gram, c.diag()) for c in slopes))
    hessian = jacobian.t() @ jacobian / 50 + ridge * penalty
    expected = torch.linalg.lstsq(hessian, jacobian.t() @ residual / 50, driver="gelsd").solution
    found = GaussNewton(600, ridge, 1e-6)._step(block, pieces(inputs, targets))
    found = torch.cat([part.flatten() for part in found]).double()

    def objective(change):
        rest = residual - jacobian @ change
        return float(rest.square().sum() / 50 + ridge * change @ penalty @ change)

    least, nothing = objective(expected), objective(torch.zeros_like(expected))
    assert least < 0.9 * nothing
    assert objective(found) == pytest.approx(least, rel=1e-3)
    if ridge == 1e-2:
        assert float((found - expected).norm()) < 2e-3 * float(expected.norm())
    else:
        free = torch.linalg.lstsq(jacobian, residual[:, None], driver="gelsd").solution.flatten()
        assert float((residual - jacobian @ found).square().sum() / 50) == pytest.approx(
            float((residual - jacobian @ free).square().sum() / 50), rel=2e-3
        )


def test_gate_and_up_move_together(opened):
    """The mistake: a step for each of them alone, which make good the same error twice."""
    block = thinned(opened("llama", "float64").blocks[0], 6)
    inputs = normal(0, 80, HIDDEN) + 0.5 * normal(1, HIDDEN)
    targets = made(block, inputs)
    shaken(block, 0.01)
    residual = (targets - made(block, inputs)).flatten()
    jacobian = linearised(block, inputs)
    parts = jacobian.chunk(2, 1)
    alone = torch.cat([torch.linalg.lstsq(part, residual[:, None]).solution for part in parts])
    step = GaussNewton(100, 1e-7, 1e-6)._step(block, pieces(inputs, targets))
    together = torch.cat([part.flatten() for part in step]).double()[:, None]
    errors = [float((residual[:, None] - jacobian @ x).norm()) for x in (together, alone)]
    assert errors[0] < 0.1 * errors[1]


@pytest.mark.parametrize("remembered", [0, 4 * 2**30])
def test_pieces_of_the_text_give_the_step_of_the_whole(monkeypatch, opened, remembered):
    block = thinned(opened("llama", "float64").blocks[0], 6)
    inputs, targets = normal(0, 70, HIDDEN), normal(1, 70, HIDDEN)
    method = GaussNewton(6, 1e-2, 1e-6)
    whole = method._step(block, pieces(inputs, targets))
    monkeypatch.setattr(gauss_newton, "REMEMBERED", remembered)
    parts = method._step(block, pieces(inputs, targets, 30))
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("size", [7, 30, 64])
def test_the_same_tokens_judge_whatever_the_pieces(size):
    """Also where other ranks have the tokens before them. The mistake: to count in each piece."""
    at = torch.arange(700).double().unsqueeze(1)
    all_rows = pieces(at[90:], -at[90:], size)
    for ahead in (90, 0):
        chosen = TokenBatches(lambda: iter(all_rows), ahead).where(lambda n: n // 32 % 7 == 6)
        inputs, targets = map(torch.cat, zip(*chosen, strict=True))
        expected = at[90:][judging(700)[ahead : ahead + 610]]
        assert torch.equal(inputs, expected)
        assert torch.equal(targets, -expected)


def test_slopes_are_forgotten_where_memory_is_short(monkeypatch, opened):
    block = thinned(opened("llama", "float64").blocks[0], 6)
    inputs, targets = normal(0, 70, HIDDEN), normal(1, 70, HIDDEN)
    method, made_of = GaussNewton(2, 1e-2, 1e-6), []
    own = GaussNewton._linearised

    def counted(self, block, inputs):
        made_of.append(len(inputs))
        return own(self, block, inputs)

    monkeypatch.setattr(GaussNewton, "_linearised", counted)
    bytes_each = 2 * 10 * 6 * 4  # gate and up, ten tokens, six channels
    for kept in (0, 3, 7):
        free = gauss_newton.SHARE * (kept * bytes_each + 1)
        monkeypatch.setattr(gauss_newton, "free_bytes", lambda _, free=free: free)
        made_of.clear()
        method._step(block, pieces(inputs, targets, 10))
        assert len(made_of) == 7 + 2 * (7 - kept)


@MLPS
@pytest.mark.parametrize("seed", range(3))
def test_a_narrowed_mlp_gets_better_and_not_on_the_seen_tokens_only(opened, name, seed):
    """The mistake: leaving it at the consumer's refit, which is already the best there is."""
    block = opened(name, "float64").blocks[seed]
    inputs = normal(seed, 2048, HIDDEN)
    targets = made(block, inputs)
    thinned(block, 20, inputs, targets)
    judge, before = judging(2048), weights(block)
    refitted = [error(block, inputs[m], targets[m]) for m in (judge, ~judge)]
    with torch.no_grad():  # as where blocks are narrowed
        GaussNewton(4, 1e-3, 1e-6).refine(block, pieces(inputs, targets))
    assert not same(block, before)
    found = [error(block, inputs[m], targets[m]) for m in (judge, ~judge)]
    assert found[0] < 0.97 * refitted[0]
    assert found[1] < 0.97 * refitted[1]
    hidden = block.mlp.channels(block.mlp.produced(inputs))
    best = hidden @ torch.linalg.lstsq(hidden, targets, driver="gelsd").solution
    least = float((targets - best).square().sum() / len(inputs))
    assert error(block, inputs, targets) == pytest.approx(least, rel=1e-3)


def test_biases_and_the_activation_stay(opened):
    block = opened("opt", "float64").blocks[0]
    inputs = normal(0, 1024, HIDDEN)
    targets = made(block, inputs)
    thinned(block, 20, inputs, targets)
    biases = [m.bias.clone() for m in (block.mlp.producers[0][0], block.mlp.consumer)]
    GaussNewton(4, 1e-3, 1e-6).refine(block, pieces(inputs, targets))
    for module, bias in zip((block.mlp.producers[0][0], block.mlp.consumer), biases, strict=True):
        assert torch.equal(module.bias, bias)


@MLPS
def test_a_step_that_only_fits_its_own_tokens_is_dropped(opened, name):
    """The mistake: taking the step unseen. The weights are then what they were, bit by bit."""
    block = thinned(opened(name, "float64").blocks[0], 20)
    inputs, judge = normal(0, 256, HIDDEN), judging(256)
    targets = made(block, inputs)
    targets[~judge] += normal(1, 224, HIDDEN)
    before, method = weights(block), GaussNewton(8, 1e-4, 1e-6)
    method.refine(block, pieces(inputs, targets))
    assert same(block, before)
    fitted = error(block, inputs[~judge], targets[~judge])
    step = method._step(block, pieces(inputs[~judge], targets[~judge]))
    for weight, change in zip(block.mlp.producer_weights, step, strict=True):
        weight.data.add_(0.25 * change)
    assert error(block, inputs[~judge], targets[~judge]) < 0.97 * fitted
    assert error(block, inputs[judge], targets[judge]) > 0.1


@pytest.mark.parametrize("noise", [0.3, 4.0])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_no_error_rises_whatever_the_noise(monkeypatch, opened, name, noise):
    """The step's on tokens that it did not see; all tokens' once the consumer is refitted."""
    taken = []
    for seed in range(2):
        inputs, judge = normal(seed, 640, HIDDEN), judging(640)
        for refitted in (True, False):
            block = opened(name, "float64").blocks[0]
            targets = made(block, inputs)
            targets += noise * targets.std() * normal(seed + 1, 640, HIDDEN)
            thinned(block, 24, inputs, targets)
            counted = judge | refitted
            old, before = weights(block), error(block, inputs[counted], targets[counted])
            with monkeypatch.context() as patch:
                if not refitted:
                    patch.setattr(GaussNewton, "_refit", lambda *_: None)
                GaussNewton(4, 1e-3, 1e-6).refine(block, pieces(inputs, targets))
            taken.append(not same(block, old))
            after = error(block, inputs[counted], targets[counted])
            assert after < before if taken[-1] else after == before
    assert noise > 0.3 or all(taken)


@MLPS
def test_nothing_changes_where_nothing_is_missing(opened, name):
    block, inputs = opened(name, "float64").blocks[0], normal(0, 512, HIDDEN)
    before, targets = weights(block), made(block, inputs)
    GaussNewton(4, 1e-3, 1e-6).refine(block, pieces(inputs, targets))
    torch.testing.assert_close(weights(block), before, rtol=1e-6, atol=1e-6)
    assert error(block, inputs, targets) < 1e-10


def test_with_no_token_to_judge_by_nothing_changes(opened):
    """Six runs of 32, and none of them is set aside."""
    block, inputs = thinned(opened("llama", "float64").blocks[0], 20), normal(0, 192, HIDDEN)
    before = weights(block)
    GaussNewton(4, 1e-3, 1e-6).refine(block, pieces(inputs, normal(1, 192, HIDDEN)))
    assert same(block, before)


@MLPS
def test_shaken_producers_are_brought_back(opened, name):
    """By far more than a refit of the consumer can."""
    block, inputs = thinned(opened(name, "float64").blocks[0], 20), normal(0, 2048, HIDDEN)
    targets = made(block, inputs)
    shaken(block, 0.02)
    before = error(block, inputs, targets)
    hidden = block.mlp.channels(block.mlp.produced(inputs))
    refit = hidden @ torch.linalg.lstsq(hidden, targets).solution
    refitted = float((targets - refit).square().sum() / len(inputs))
    GaussNewton(30, 1e-6, 1e-8).refine(block, pieces(inputs, targets))
    after = error(block, inputs, targets)
    assert refitted > 0.3 * before
    assert after < 0.02 * before


@pytest.mark.parametrize(("stretch", "taken"), [(1, 1), (2.8, 0.5), (6.0, 0.25), (12.0, 0)])
def test_too_long_a_step_is_halved_or_dropped(monkeypatch, opened, stretch, taken):
    """Near the solution the error is a parabola: it falls up to twice the step."""
    block, inputs = thinned(opened("llama", "float64").blocks[0], 20), normal(0, 2048, HIDDEN)
    targets = made(block, inputs)
    shaken(block, 0.002)
    before, method = weights(block), GaussNewton(30, 1e-6, 1e-8)
    step = GaussNewton._step
    fit = ~judging(2048)
    full = method._step(block, pieces(inputs[fit], targets[fit]))
    monkeypatch.setattr(GaussNewton, "_step", lambda *a: [stretch * x for x in step(*a)])
    method.refine(block, pieces(inputs, targets))
    for weight, old, change in zip(block.mlp.producer_weights, before, full, strict=False):
        expected = taken * stretch * change
        torch.testing.assert_close(weight - old, expected, rtol=1e-3, atol=1e-6, check_dtype=False)
    assert taken or same(block, before)
