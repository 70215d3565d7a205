"""Sparse forms: packing, which weights stay, what the others become."""

import warnings
from itertools import combinations, product
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from secateur.allocate.base import Evidence
from secateur.layers import sparse_secateur as layers
from secateur.layers.forms_secateur import FORMS, build, fill, layer_class
from secateur.layers.sparse_secateur import decoded, encoded, packed, unpacked
from secateur.linalg.least_squares import DampingWarning
from secateur.linalg.masks import largest, largest_of_groups
from secateur.methods.form import Metric
from secateur.methods.magnitude import Magnitude
from secateur.methods.sparsegpt import COLUMNS, SparseGPT, inverse_factor, swept
from secateur.methods.wanda import Wanda
from secateur.structure.costs import counted
from secateur.structure.sites import Site
from secateur.utils.errors import InputError

SPARSE = (Magnitude, Wanda, SparseGPT)
PATTERNS = ("", "1:2", "2:4", "1:4", "3:4", "3:8", "4:8", "1:8", "2:6", "5:12")


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def metric_of(inputs, seed=1):
    """Inputs of different energy that have to do with each other."""
    x = drawn(4 * inputs, inputs, seed=seed) @ drawn(inputs, inputs, seed=seed + 1)
    x = x * (0.2 + torch.arange(inputs) % 5)
    return Metric(x.T @ x / len(x))


def form_with(method, weight, density):
    """The level that keeps that share of the weights."""
    (found,) = (
        form
        for form in method.forms(*weight.shape, False)
        if form.spec["count"] == round(density * weight.numel())
    )
    return found


def masks(outputs, inputs, count):
    """All masks that keep ``count`` of every row, a row at a time."""
    for kept in combinations(range(inputs), count):
        mask = torch.zeros(inputs, dtype=torch.bool)
        mask[list(kept)] = True
        yield mask


# packing


@pytest.mark.parametrize("count", [1, 7, 8, 9, 24, 31])
def test_bits_come_back(count):
    bits = drawn(5, count) > 0
    codes = packed(bits)
    assert codes.shape == (5, -(-count // 8))
    assert torch.equal(unpacked(codes, count), bits)
    assert packed(torch.tensor([[True] + [False] * 8 + [True]])).tolist() == [[1, 2]]


@pytest.mark.parametrize("pattern", PATTERNS[1:])
def test_codes_of_n_m_come_back_and_take_the_fewer_bits(pattern):
    n, m = map(int, pattern.split(":"))
    mask = largest_of_groups(drawn(6, 10 * m), n, m)
    codes = encoded(mask, n, m)
    bits = 10 * min(m, n * (m - 1).bit_length())
    assert codes.shape == (6, -(-bits // 8))
    assert torch.equal(decoded(codes, 10 * m, n, m), mask)


def test_two_of_four_take_two_bits_each():
    mask = torch.tensor([[False, True, False, True, True, True, False, False]])
    assert encoded(mask, 2, 4).tolist() == [[0b01_00_11_01]]


@pytest.mark.parametrize(("n", "m", "codes"), [(2, 4, 0), (2, 4, 0b0001), (1, 3, 3), (3, 8, 0b11)])
def test_codes_that_name_no_places_are_refused(n, m, codes):
    """Twice the same place, places in descending order, one out of the group, too few."""
    with pytest.raises(ValueError, match=f"which {n} of every {m}"):
        decoded(torch.tensor([[codes]], dtype=torch.uint8), m, n, m)


def test_a_mask_with_another_count_is_refused():
    spec = {"form": "sparse", "outputs": 2, "inputs": 8, "bias": False, "count": 3}
    tensors = {"mask": torch.tensor([[3], [3]], dtype=torch.uint8), "values": torch.ones(3)}
    with pytest.raises(ValueError, match="4 weights"):
        fill(spec, tensors, None, torch.float32).dense()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"form": "sparse", "count": 97}, "at most 96"),
        ({"form": "n_m", "n": 4, "m": 4}, "n should be below m"),
        ({"form": "n_m", "n": 1, "m": 5}, "m should divide"),
        ({"form": "n_m", "n": 1, "m": 512, "inputs": 1024}, "at most 256"),
        ({"form": "armor", "block": 6}, "4 should divide"),
        ({"form": "armor", "block": 16}, "block should divide"),
        ({"form": "armor", "block": 0}, "above 0"),
        ({"form": "sparse", "count": True}, "above 0"),
    ],
)
def test_specs_out_of_bounds_are_refused(changes, problem):
    with pytest.raises(ValueError, match=problem):
        layer_class({"outputs": 8, "inputs": 12, "bias": False, **changes})


@pytest.mark.parametrize("method", SPARSE)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_its_weight_its_bytes_and_its_file(method, pattern, dtype):
    weight, bias = drawn(10, 24), drawn(10).to(dtype)
    made = method(pattern=pattern)
    metric = metric_of(24)
    form = made.forms(10, 24, True)[-1]
    layer = made.layer(weight, metric, form, bias, dtype)
    expected = made.pruned(weight, metric, form)[0].to(dtype)
    assert torch.equal(layer.dense(), expected)
    x = drawn(3, 5, 24).to(dtype)
    assert torch.equal(layer(x), nn.functional.linear(x, expected, bias))
    state = layer.state_dict()
    size = sum(t.numel() * t.element_size() for name, t in state.items() if name != "bias")
    assert size == form.bytes(dtype.itemsize) < weight.numel() * dtype.itemsize
    other = build(dict(form.spec)).to(dtype)
    other.load_state_dict(state)
    assert torch.equal(other.dense(), expected)


def test_a_dense_weight_made_in_inference_serves_training():
    layer = two_of_four()
    with torch.inference_mode():
        layer(drawn(3, 16).float())
    x = drawn(3, 16).float().requires_grad_()
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.dense().sum(0).expand(3, -1))


def test_what_is_packed_is_not_trained_whoever_loads_it():
    layer = build({"form": "n_m", "outputs": 2, "inputs": 8, "bias": True, "n": 2, "m": 4})
    layer.values = nn.Parameter(torch.ones(2, 4))
    layer.bias = nn.Parameter(torch.ones(2))
    assert not layer.values.requires_grad
    assert layer.bias.requires_grad


def test_forms_say_that_they_are_computed_dense():
    for name in ("sparse", "n_m", "armor"):
        assert FORMS[name].densified
    form = Wanda(pattern="2:4").forms(8, 16, False)[0]
    assert form.multiplications == 8 * 16


# patterns


@pytest.mark.parametrize("method", SPARSE)
@pytest.mark.parametrize("pattern", PATTERNS[1:])
def test_n_of_every_m_stay(method, pattern):
    n, m = map(int, pattern.split(":"))
    weight, metric, made = drawn(9, 48), metric_of(48), method(pattern=pattern)
    (form,) = made.forms(9, 48, False)
    found, mask = made.pruned(weight, metric, form)
    assert bool((mask.unflatten(1, (-1, m)).sum(-1) == n).all())
    assert torch.equal(found != 0, mask)


@pytest.mark.parametrize("method", SPARSE)
def test_as_many_stay_as_the_level_says(method):
    made = method(floor=0.0)
    weight, metric = drawn(9, 160), metric_of(160)
    forms = made.forms(9, 160, False)
    assert len(forms) == 15
    for form in forms:
        found, mask = made.pruned(weight, metric, form)
        assert int(mask.sum()) == int((found != 0).sum()) == form.spec["count"]
        if method is Wanda:
            assert len(set(mask.sum(1).tolist())) == 1


@pytest.mark.parametrize("method", SPARSE)
def test_errors_are_those_of_the_layers(method):
    weight, made, metric = drawn(7, 24), method(pattern="*:8", floor=0.25), metric_of(24)
    forms = made.forms(7, 24, False)
    assert [form.label for form in forms] == [f"{n}:8" for n in range(2, 8)]
    found = made.errors(weight, metric, forms)
    for form, error in zip(forms, found, strict=True):
        layer = made.layer(weight, metric, form, None, torch.float64)
        assert error == pytest.approx(metric.error(weight - layer.dense()), rel=1e-12)
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("2-4", "'2:4'"),
        ("4:4", "nearest is '3:4'"),
        ("0:4", "nearest is '1:4'"),
        ("1:1", "nearest is '1:2'"),
        ("*:999", r"nearest is '\*:256'"),
    ],
)
def test_patterns_that_are_none_are_refused(pattern, says):
    with pytest.raises(InputError, match=says):
        Wanda(pattern=pattern)


def model_of(*shapes, itemsize=2):
    """What methods ask of a model, with one block of linears of these (outputs, inputs)."""
    linears = [
        SimpleNamespace(
            path=f"l{i}", module=nn.Linear(n, m, bias=False), factor=False, order=0, published=True
        )
        for i, (m, n) in enumerate(shapes)
    ]
    anatomy = SimpleNamespace(blocks="layers")
    block = SimpleNamespace(index=0, linear_layers=linears, hidden=8, anatomy=anatomy)
    stored = SimpleNamespace(itemsize=itemsize)
    return SimpleNamespace(blocks=[block], stored=stored, narrowed=False)


def test_m_that_divides_nothing_is_an_obstacle_that_names_the_nearest():
    model = model_of((8, 12), (8, 20))
    found = Wanda(pattern="4:8").obstacle(model)
    assert "8 divides none" in found
    assert "12, 20" in found
    assert "--pattern '2:4'" in found
    assert "--pattern 'any:4'" in Wanda(pattern="any:8").obstacle(model)
    assert Wanda(pattern="2:4").obstacle(model) is None
    # one that divides some leaves the others dense
    units = Wanda(pattern="2:5").units(model, 1)
    assert [unit.fixed for unit in units] == [True, False]


# what stays


def test_magnitude_keeps_the_nearest_matrix():
    weight = drawn(2, 5)
    form = form_with(Magnitude(grain=5, floor=0.0), weight, 0.4)
    _, mask = Magnitude().pruned(weight, Metric.identity(5, weight), form)
    lost = min(
        float(weight.flatten()[~kept].square().sum()) for kept in masks(1, 10, form.spec["count"])
    )
    assert float(weight[~mask].square().sum()) == pytest.approx(lost, rel=1e-12)


def test_magnitudes_floor_holds_in_a_matrix_of_small_weights():
    """No level is below it, so no threshold can empty a matrix."""
    for floor in (0.25, 0.5):
        forms = Magnitude(floor=floor).forms(64, 64, False)
        assert min(form.spec["count"] for form in forms) == floor * 64 * 64


@pytest.mark.parametrize("inputs", [6, 8])
def test_wanda_keeps_the_mask_of_least_error(inputs):
    """By all masks of a row. A score of |W| h instead of |W| √h is not the least."""
    weight, metric = drawn(12, inputs), metric_of(inputs)
    form = form_with(Wanda(grain=2), weight, 0.5)
    found, mask = Wanda().pruned(weight, metric, form)
    cost = weight.square() * metric.energy
    least = torch.stack([cost[:, ~kept].sum(1) for kept in masks(1, inputs, inputs // 2)]).amin(0)
    assert torch.allclose((cost * ~mask).sum(1), least, rtol=1e-12)
    assert torch.equal(found[mask], weight[mask])


@pytest.mark.parametrize("pattern", ["", "2:4"])
def test_wanda_of_equal_inputs_goes_by_weights_row_by_row(pattern):
    weight = drawn(6, 16)
    made = Wanda(pattern=pattern, grain=2)
    (form,) = made.forms(6, 16, False)
    _, mask = made.pruned(weight, Metric(3 * torch.eye(16).double()), form)
    size = weight.abs()
    assert torch.equal(mask, largest_of_groups(size, 2, 4) if pattern else largest(size, 8))


def test_wanda_is_the_same_for_rows_in_another_order():
    weight, metric, order = drawn(6, 16), metric_of(16), torch.tensor([3, 0, 5, 1, 4, 2])
    form = form_with(Wanda(grain=2), weight, 0.5)
    one, other = (Wanda().pruned(w, metric, form)[0] for w in (weight, weight[order]))
    assert torch.equal(one[order], other)


def test_of_equal_weights_the_first_stay():
    assert largest(torch.ones(2, 5), 2).tolist() == [[True, True, False, False, False]] * 2


# SparseGPT


def fixed(mask):
    return lambda first, scores: mask[:, first : first + scores.shape[1]]


def test_the_factor_is_of_the_inverse():
    gram = metric_of(7).gram
    factor = inverse_factor(gram, 0.01)
    whole = gram + 0.01 * gram.diagonal().mean() * torch.eye(7).double()
    assert torch.equal(factor, factor.triu())
    assert torch.allclose(factor.T @ factor, torch.linalg.inv(whole), rtol=1e-10)


def test_the_first_column_is_obs():
    """w − w₀ H⁻¹:₀ / [H⁻¹]₀₀, the optimal brain surgeon's answer."""
    weight, metric = drawn(5, 9), metric_of(9)
    mask = torch.ones_like(weight, dtype=torch.bool)
    mask[:, 0] = False
    found, _ = swept(weight, inverse_factor(metric.gram, 0.0), fixed(mask), COLUMNS)
    inverse = torch.linalg.inv(metric.gram)
    expected = weight - weight[:, :1] / inverse[0, 0] * inverse[0]
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)
    assert bool((found[:, 0] == 0).all())


def test_where_nothing_goes_nothing_changes():
    weight = drawn(5, 200)
    everything = fixed(torch.ones_like(weight, dtype=torch.bool))
    assert torch.equal(
        swept(weight, inverse_factor(metric_of(200).gram, 0.01), everything, COLUMNS)[0], weight
    )


@pytest.mark.parametrize("pattern", ["", "2:4"])
def test_of_unrelated_inputs_sparsegpt_is_magnitude(pattern):
    weight, metric = drawn(6, 64), Metric(5 * torch.eye(64).double())
    form = SparseGPT(pattern=pattern).forms(6, 64, False)[0]
    found, mask = SparseGPT().pruned(weight, metric, form)
    assert torch.equal(mask, Magnitude().pruned(weight, metric, form)[1])
    assert torch.allclose(found, weight * mask, rtol=1e-14)


@pytest.mark.parametrize(("inputs", "pattern"), [(24, "2:4"), (300, ""), (300, "5:12")])
def test_what_stays_makes_up_for_what_goes(inputs, pattern):
    """Between the mask without an update and the least squares on it."""
    weight, metric = drawn(6, inputs), metric_of(inputs)
    made = SparseGPT(pattern=pattern)
    form = made.forms(6, inputs, False)[0]
    found, mask = made.pruned(weight, metric, form)
    least = 0.0
    for row, kept in zip(weight, mask, strict=True):
        own = metric.gram[kept][:, kept]
        best = torch.zeros_like(row)
        best[kept] = torch.linalg.solve(own, metric.gram[kept] @ row)
        least += metric.error((row - best).unsqueeze(0))
    error = metric.error(weight - found)
    assert least * (1 - 1e-9) <= error < 0.85 * metric.error(weight - weight * mask)
    assert error < metric.error(weight - Wanda(pattern=pattern).pruned(weight, metric, form)[0])


def test_a_sweep_is_the_same_in_blocks_of_any_size():
    weight, factor = drawn(4, 300), inverse_factor(metric_of(300).gram, 0.01)
    mask = drawn(4, 300, seed=5) > 0
    one, other = (swept(weight, factor, fixed(mask), span)[0] for span in (4, 300))
    assert torch.allclose(one, other, rtol=1e-9, atol=1e-10)


def test_a_singular_gram_is_damped_aloud_and_no_magnitude():
    """An identity in place of H, as public code falls back to, would be magnitude and silent."""
    weight, x = drawn(6, 16), drawn(5, 16)
    metric = Metric(x.T @ x / 5)
    made = SparseGPT(ridge=0.0)
    form = made.forms(6, 16, False)[0]
    with pytest.warns(DampingWarning, match="ridge raised"):
        found, _ = made.pruned(weight, metric, form)
    assert metric.error(weight - found) < 0.1 * metric.error(
        weight - Magnitude().pruned(weight, metric, form)[0]
    )


def test_what_is_no_gram_is_refused():
    metric = Metric(-torch.eye(8).double())
    form = SparseGPT().forms(4, 8, False)[0]
    with pytest.raises(InputError, match="not positive semidefinite"):
        SparseGPT().pruned(drawn(4, 8), metric, form)


def test_inputs_that_were_silent_go_first_and_keep_their_weights_if_they_stay():
    weight, gram = drawn(4, 8), metric_of(8).gram
    gram[:, 5] = gram[5] = 0
    keep = fixed(torch.ones_like(weight, dtype=torch.bool))
    factor = inverse_factor(gram, 0.01)
    assert torch.equal(swept(weight, factor, keep, COLUMNS)[0], weight)
    form = form_with(SparseGPT(grain=8), weight, 0.875)
    _, mask = SparseGPT(ridge=1e-6).pruned(weight, Metric(gram), form)
    assert mask.sum(0).tolist() == [4, 4, 4, 4, 4, 0, 4, 4]


# kernels


@pytest.fixture
def kernels(monkeypatch):
    """A device that has kernels for 2:4: those of a test."""

    def install(make):
        monkeypatch.setattr(layers, "has_kernel", lambda *_: True)
        monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", make)

    return install


def two_of_four():
    weight = drawn(8, 16).float()
    made = Magnitude(pattern="2:4")
    form = made.forms(8, 16, False)[0]
    return made.layer(weight.double(), Metric.identity(16, weight), form, None, torch.float32)


def test_cpus_have_no_kernel():
    assert not layers.has_kernel(torch.ones(64, 64, dtype=torch.bfloat16), 64, 64)


def test_a_kernel_serves_many_tokens_and_not_few(kernels):
    used = []
    kernels(lambda weight: used.append(1) or weight.clone())
    layer = two_of_four()
    few, many = drawn(4, 16).float(), drawn(2, layers.MANY, 16).float()
    expected = layer.dense()
    assert torch.equal(layer(few), few @ expected.T)
    assert not used
    assert torch.allclose(layer(many), many @ expected.T, atol=1e-6)
    layer(many)
    assert len(used) == 1
    layer.forget()
    layer(many)
    assert len(used) == 2


@pytest.mark.parametrize("broken", [lambda weight: weight * 1.1, lambda weight: weight * torch.nan])
def test_a_kernel_that_computes_something_else_is_not_used(kernels, broken):
    kernels(broken)
    layer, x = two_of_four(), drawn(layers.MANY, 16).float()
    with pytest.warns(UserWarning, match="kernel is wrong here"):
        found = layer(x)
    assert torch.equal(found, x @ layer.dense().T)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)  # is said once


def test_a_kernel_that_torch_refuses_is_not_used(kernels):
    def refuse(_):
        raise RuntimeError("not on this device\nmore")

    kernels(refuse)
    layer, x = two_of_four(), drawn(layers.MANY, 16).float()
    with pytest.warns(UserWarning, match="dense products instead: not on this device"):
        assert torch.equal(layer(x), x @ layer.dense().T)


@pytest.mark.parametrize("method", SPARSE)
def test_every_count_is_reached(method):
    """Levels that no block of columns divides evenly."""
    for outputs, inputs in product((1, 3), (5, 130)):
        made = method(grain=7, floor=0.0)
        for form in made.forms(outputs, inputs, False):
            _, mask = made.pruned(drawn(outputs, inputs), metric_of(inputs), form)
            assert int(mask.sum()) == form.spec["count"]


def test_least_squares_lost_is_one_threshold_for_all_matrices():
    """Two matrices of different size of weights: what is kept is what one threshold keeps."""
    small, large = 0.5 * drawn(16, 32), drawn(16, 32, seed=4)
    model = model_of((16, 32), (16, 32))
    linears = model.blocks[0].linear_layers
    for linear, weight in zip(linears, (small, large), strict=True):
        linear.module.requires_grad_(False).weight.copy_(weight)
    block = SimpleNamespace(
        linear_layers=[
            SimpleNamespace(**vars(linear), site=Site("mlp", "hidden"), behind=None)
            for linear in linears
        ],
        module=SimpleNamespace(
            get_submodule={linear.path: linear.module for linear in linears}.get
        ),
    )
    made = Magnitude(grain=16, floor=0.0)
    units = made.units(model, 1)
    curves = {unit.name: made.solve(unit, block, {}).curve for unit in units}
    for unit, weight in zip(units, (small, large), strict=True):
        assert curves[unit.name].at(0) == pytest.approx(float(weight.square().sum()) / 8**2)
    sizes = made.allocator.allocate(units, Evidence(curves), counted(units, "bytes", 2), 0.5)
    counts = [unit.at(sizes[unit.name]).spec["count"] for unit in units]
    values = torch.cat((small.flatten().abs(), large.flatten().abs())).sort().values
    threshold = values[-sum(counts)]
    for weight, count in zip((small, large), counts, strict=True):
        assert abs(int((weight.abs() >= threshold).sum()) - count) <= 32  # a level
    assert counts[0] < 0.7 * counts[1]
