"""ARMOR: its steps are exact, its loss never rises, and it starts from NoWag-P."""

from itertools import combinations, pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from secateur.layers import sparse_secateur as layers
from secateur.layers.forms_secateur import build
from secateur.linalg.block_2_4 import Factors, descent, norms, regrouped, slid, wrapped
from secateur.linalg.masks import largest_of_groups
from secateur.methods.armor import Armor
from secateur.methods.form import Metric
from secateur.utils.errors import InputError


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def energies(inputs, seed=3):
    return drawn(inputs, seed=seed).square() + 0.05


def loss_of(state, target, energy):
    error = state.product().flatten(0, 1).flatten(1) - target
    return float((error.square() * energy).sum())


def problem(outputs=16, inputs=24, block=8):
    """A state that is not the first, its target and its energies, as matrix and in blocks."""
    target, energy = drawn(outputs, inputs), energies(inputs)
    *_, (state, _) = descent(target, energy, block, 3, 0)
    blocks = target.view(outputs // block, block, inputs // block, block)
    return state, target, energy, blocks, energy.sqrt().view(-1, 1, block)


def diagonal(blocks):
    return torch.block_diag(*blocks)


def test_the_product_is_of_block_diagonal_matrices():
    state, *_ = problem()
    core = state.core.flatten(0, 1).flatten(1)
    expected = diagonal(state.left) @ core @ diagonal(state.right)
    assert torch.allclose(state.product().flatten(0, 1).flatten(1), expected, rtol=1e-12)
    assert bool((state.mask.flatten(0, 1).flatten(1).unflatten(1, (-1, 4)).sum(-1) == 2).all())
    assert bool((core.view(state.mask.shape)[~state.mask] == 0).all())


def test_a_group_gets_the_best_support_by_least_squares():
    """One group of every pair of blocks, by enumeration of its supports."""
    state, _, _, blocks, root = problem()
    after = regrouped(state, blocks, root, torch.Generator().manual_seed(5))
    seen = 0
    for p in range(len(state.left)):
        for q in range(len(state.right)):
            own, scale = (p, slice(None), q, slice(None)), root[q, 0]
            before, changed = state.core[own], after.core[own]
            places = {(int(i), int(j) // 4) for i, j in (before != changed).nonzero()}
            assert len(places) <= 1
            for row, group in places:
                columns = range(4 * group, 4 * group + 4)
                base = before.clone()
                base[row, list(columns)] = 0
                wanted = (blocks[own] - state.left[p] @ base @ state.right[q]) * scale
                of = [
                    torch.outer(state.left[p][:, row], state.right[q][column]) * scale
                    for column in range(len(before))
                ]
                least = []
                for pair in combinations(columns, 2):
                    basis = torch.stack([of[column].flatten() for column in pair], 1)
                    best = torch.linalg.lstsq(basis, wanted.flatten()).solution
                    error = float((basis @ best - wanted.flatten()).square().sum())
                    least.append((error, pair, best))
                error, pair, best = min(least, key=lambda item: item[0])
                found = (blocks[own] - state.left[p] @ changed @ state.right[q]) * scale
                assert float(found.square().sum()) == pytest.approx(error, rel=1e-10)
                assert torch.allclose(changed[row, list(pair)], best, rtol=1e-8)
                kept = after.mask[own][row, 4 * group : 4 * group + 4].nonzero().flatten()
                assert (kept + 4 * group).tolist() == list(pair)
                seen += 1
    assert seen > len(state.left) * len(state.right) / 2


def test_wrappers_are_least_squares():
    state, target, energy, blocks, root = problem()
    after = wrapped(state, blocks, root)
    core = state.core.flatten(0, 1).flatten(1)
    scale = energy.sqrt()
    inner = core @ diagonal(state.right) * scale
    for index, own in enumerate(after.left):
        rows = slice(8 * index, 8 * index + 8)
        best = torch.linalg.lstsq(inner[rows].T, (target * scale)[rows].T).solution.T
        assert torch.allclose(own, best, rtol=1e-5, atol=1e-6)
    inner = diagonal(after.left) @ core
    for index, own in enumerate(after.right):
        columns = slice(8 * index, 8 * index + 8)
        best = torch.linalg.lstsq(inner[:, columns], target[:, columns]).solution
        assert torch.allclose(own, best, rtol=1e-5, atol=1e-6)


def test_sliding_stops_where_the_error_is_least():
    """Along the way of every pair of blocks; further or nearer is worse."""
    state, target, energy, blocks, root = problem()
    after = slid(state, blocks, root)
    least = loss_of(after, target, energy)
    assert least < loss_of(state, target, energy)
    for share in (0.98, 1.02):
        core = state.core + share * (after.core - state.core)
        assert loss_of(state._replace(core=core), target, energy) > least
    assert torch.equal(after.mask, state.mask)
    assert bool((after.core[~after.mask] == 0).all())


@pytest.mark.parametrize("quiet", [False, True])
def test_no_step_raises_the_loss(quiet):
    """The trace falls from NoWag-P's loss on, also where inputs or rows are silent."""
    weight, energy = drawn(24, 32), energies(32)
    if quiet:
        energy[4:12] = 0
        weight[3] = 0
        weight[:, 20:24] = 0
    weight = weight / norms(weight, 0)
    trace = list(descent(weight, energy, 8, 60, 0))
    losses = [loss for _, loss in trace]
    assert len(losses) == 61
    mask = largest_of_groups(weight.square() * energy, 2, 4)
    start = float(((weight * ~mask).square() * energy).sum())
    assert losses[0] == pytest.approx(start, rel=1e-12)
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(losses))
    assert losses[-1] < 0.5 * losses[0]
    for state, loss in trace[::10]:
        assert loss == pytest.approx(loss_of(state, weight, energy), rel=1e-9)
        assert bool(torch.isfinite(state.product()).all())


def made_with(rounds, outputs=24, inputs=32, block=8, dtype=torch.float64):
    weight, x = drawn(outputs, inputs) * (1 + torch.arange(inputs) % 3), drawn(90, inputs)
    metric = Metric(x.T @ (x * (1 + torch.arange(inputs) % 4)) / 90)
    method = Armor(block=block, rounds=rounds)
    (form,) = method.forms(outputs, inputs, False)
    return weight, metric, form, method.layer(weight, metric, form, None, dtype)


def test_without_rounds_it_is_nowag_p():
    weight, metric, _, layer = made_with(0)
    columns = weight.norm(dim=0)
    scaled = weight / columns
    scaled = scaled / scaled.norm(dim=1, keepdim=True)
    mask = largest_of_groups(scaled.square() * metric.energy, 2, 4)
    assert torch.allclose(layer.dense(), weight * mask, rtol=1e-12)
    assert torch.equal(layer.dense() != 0, mask)


def test_the_proxy_ends_below_nowag_p():
    """By what is stored, not by what the search says of itself."""

    def proxy(rounds):
        weight, metric, _, layer = made_with(rounds)
        columns = norms(weight, 0)
        rows = norms(weight / columns, 1).unsqueeze(1)
        return float((((weight - layer.dense()) / columns / rows).square() * metric.energy).sum())

    first, *rest = [proxy(rounds) for rounds in (0, 1, 5, 40)]
    assert all(after < first for after in rest)
    assert rest == sorted(rest, reverse=True)


def test_the_best_state_stays(monkeypatch):
    """Should a step ever make it worse."""
    from secateur.methods import armor

    states = []

    def worsening(*arguments):
        for state, loss in descent(*arguments):
            states.append(state)
            yield state, loss
        yield state._replace(core=state.core * 3), 9 * loss + 1

    monkeypatch.setattr(armor, "descent", worsening)
    weight, _, _, layer = made_with(5)
    columns = norms(weight, 0)
    rows = norms(weight / columns, 1)
    expected = rows.unsqueeze(1) * states[-1].product().flatten(0, 1).flatten(1) * columns
    assert torch.allclose(layer.dense(), expected, rtol=1e-12)


def test_what_has_the_form_is_found_again():
    """A planted core between planted wrappers that are not far from none."""
    block, shape = 4, (16, 16)
    core = drawn(*shape, seed=7)
    core = core * largest_of_groups(core.abs(), 2, 4)
    near = [torch.eye(block) + 0.1 * drawn(4, block, block, seed=s) for s in (8, 9)]
    state = Factors(near[0], core.view(4, 4, 4, 4), (core != 0).view(4, 4, 4, 4), near[1])
    target = state.product().flatten(0, 1).flatten(1)
    losses = [loss for _, loss in descent(target, torch.ones(16).double(), block, 400, 0)]
    assert losses[-1] < 1e-3 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_its_weight_its_bytes_and_its_file(dtype):
    _, _, form, layer = made_with(5, dtype=dtype, outputs=64, inputs=96)
    core = layer.core().double()
    whole = diagonal(layer.left.double()) @ core @ diagonal(layer.right.double())
    assert bool((core.unflatten(1, (-1, 4)).count_nonzero(-1) <= 2).all())
    assert torch.allclose(layer.dense().double(), whole, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
    x = drawn(3, 96).to(dtype)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.dense()))
    state = layer.state_dict()
    assert sum(t.numel() * t.element_size() for t in state.values()) == form.bytes(dtype.itemsize)
    assert form.bytes(2) == 64 * 96 // 2 * 2 + 64 * 96 // 8 + 8 * (64 + 96) * 2
    other = build(dict(form.spec)).to(dtype)
    other.load_state_dict(state)
    assert torch.equal(other.dense(), layer.dense())


def test_three_products_are_one(monkeypatch):
    """What a kernel would do, with a dense core in its place."""
    _, _, _, layer = made_with(5, dtype=torch.float32)
    monkeypatch.setattr(layers, "has_kernel", lambda *_: True)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", torch.clone)
    x = drawn(2, layers.MANY, 32).float()
    assert layer.kernel(x) is not None
    assert torch.allclose(layer(x), x @ layer.dense().T, atol=1e-4)
    assert not torch.equal(layer.core(), layer.dense())


def test_the_same_seed_gives_the_same_bytes():
    one, other = (made_with(20)[3].state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_silent_layer_stays_finite():
    method = Armor(block=4, rounds=5)
    (form,) = method.forms(8, 8, False)
    for weight, gram in ((torch.zeros(8, 8), torch.eye(8)), (drawn(8, 8), torch.zeros(8, 8))):
        layer = method.layer(weight.double(), Metric(gram.double()), form, None, torch.float64)
        assert bool(torch.isfinite(layer.dense()).all())


def test_blocks_that_fit_nothing():
    with pytest.raises(InputError, match="multiple of 4, e"):
        Armor(block=30)
    linears = [
        SimpleNamespace(
            path="a", module=nn.Linear(64, 64, bias=False), factor=False, order=0, published=True
        ),
        SimpleNamespace(
            path="b", module=nn.Linear(64, 172, bias=False), factor=False, order=0, published=True
        ),
    ]
    anatomy = SimpleNamespace(blocks="layers")
    block = SimpleNamespace(index=0, linear_layers=linears, hidden=64, anatomy=anatomy)
    stored = SimpleNamespace(itemsize=2)
    model = SimpleNamespace(blocks=[block], stored=stored, narrowed=False)
    found = Armor(block=32).obstacle(model)  # 64 x 64 would take more than dense
    assert "64 x 64, 172 x 64" in found
    assert "--block 8" in found
    assert Armor(block=8).obstacle(model) is None
    assert [unit.fixed for unit in Armor(block=8).units(model, 1)] == [False, True]
