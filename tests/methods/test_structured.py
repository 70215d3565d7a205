"""Products of blocks and permutations: layers, projections, limits, and the dense shortcut."""

import math

import pytest
import torch

from secateur import InputError
from secateur.layers.forms_secateur import FORMS, build, fill
from secateur.methods import check_served
from secateur.methods.block_dense import BlockDenseProjection
from secateur.methods.block_shuffle import BlockShuffleProjection
from secateur.methods.form import Metric
from secateur.methods.monarch import MonarchProjection
from secateur.methods.structured import undivided
from secateur.methods.svd_llm import SVDLLM
from secateur.structure.parametrizations import form_of
from secateur.structure.units import Matrix

METHODS = [MonarchProjection, BlockDenseProjection, BlockShuffleProjection]
SPECS = [
    {"form": "monarch", "outputs": 12, "inputs": 8, "in_blocks": 4, "out_blocks": 2, "rank": 2},
    {"form": "monarch", "outputs": 8, "inputs": 18, "in_blocks": 3, "out_blocks": 4, "rank": 1},
    {"form": "monarch", "outputs": 6, "inputs": 4, "in_blocks": 1, "out_blocks": 1, "rank": 3},
    {"form": "block_shuffle", "outputs": 18, "inputs": 12, "blocks": 3},  # 4 shared out as 2, 1, 1
    {"form": "block_shuffle", "outputs": 8, "inputs": 24, "blocks": 4},  # fewer between than blocks
    {"form": "block_shuffle", "outputs": 6, "inputs": 4, "blocks": 1},
    {"form": "block_dense", "outputs": 6, "inputs": 12, "blocks": 3, "rank": 2},
    {"form": "block_dense", "outputs": 6, "inputs": 12, "blocks": 1, "rank": 4},
]
EVERY = pytest.mark.parametrize("spec", SPECS, ids=lambda s: "-".join(str(v) for v in s.values()))


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def metric(seed, inputs, ridge=0.0):
    """Inputs of unequal energy that have much to do with each other."""
    x = normal(seed, 6 * inputs, inputs) @ normal(seed + 1, inputs, inputs)
    x = x * (0.1 + normal(seed + 2, inputs).abs())
    return Metric(x.mT @ x / len(x), ridge)


def apart(seed, inputs, blocks):
    """The same without what inputs of different blocks have in common."""
    gram = metric(seed, inputs).gram
    return Metric(torch.block_diag(*blocks_of(gram, blocks)))


def blocks_of(gram, blocks):
    width = len(gram) // blocks
    return [gram[i : i + width, i : i + width] for i in range(0, len(gram), width)]


def tensors_of(spec, seed=0):
    layout = FORMS[spec["form"]].tensors(spec)
    return {name: normal(seed + i, *shape) for i, (name, (shape, _)) in enumerate(layout.items())}


def layer_of(spec, tensors, bias=None):
    return fill({**spec, "bias": bias is not None}, tensors, bias, torch.float64).eval()


def method_of(spec, **options):
    (found,) = (m for m in METHODS if m.layers.form == spec["form"])
    return found(**options)


def form(spec):
    return form_of({**spec, "bias": False}, "")


def projected(spec, weight, metric, **options):
    method = method_of(spec, **options)
    return layer_of(spec, method.reshaped(weight, metric, form(spec))).dense()


def by_definition(spec, first, second):
    """The weight, entry by entry, from where each number between its maps comes and goes."""
    before, behind, middle = FORMS[spec["form"]].blocks(spec)
    weight = torch.zeros(spec["outputs"], spec["inputs"]).double()
    width, height = spec["inputs"] // before, spec["outputs"] // behind
    for place in range(before * middle):
        block, group = place // middle, place % behind
        for row in range(height):
            for column in range(width):
                weight[row * behind + group, block * width + column] += (
                    second[group, row, place // behind] * first[block, place % middle, column]
                )
    return weight


@EVERY
def test_a_layer_is_its_dense_weight_and_that_is_its_definition(spec):
    tensors, bias = tensors_of(spec), normal(9, spec["outputs"])
    layer = layer_of(spec, tensors, bias)
    weight = by_definition(spec, tensors["first"], tensors["second"])
    torch.testing.assert_close(layer.dense(), weight)
    for shape in [(), (5,), (2, 3), (2, 0)]:
        x = normal(10, *shape, spec["inputs"])
        torch.testing.assert_close(layer(x), x @ weight.mT + bias)


@EVERY
def test_a_spec_says_what_is_stored_and_multiplied(spec):
    layer = layer_of(spec, tensors_of(spec))
    state, priced = layer.state_dict(), form(spec)
    assert sum(t.numel() for t in state.values()) == priced.numbers == priced.parameters
    assert priced.bytes(2) == 2 * priced.numbers
    assert layer.multiplications(layer.spec) == priced.numbers  # each number once a token
    other = build(layer.spec).double()
    other.load_state_dict(state)
    assert torch.equal(other.dense(), layer.dense())


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"form": "monarch", "in_blocks": 3, "out_blocks": 2, "rank": 1}, "divide the inputs"),
        ({"form": "monarch", "in_blocks": 4, "out_blocks": 5, "rank": 1}, "divide the inputs"),
        ({"form": "monarch", "in_blocks": 4, "out_blocks": 2, "rank": 3}, "at most 2"),
        ({"form": "block_dense", "blocks": 2, "rank": 5}, "at most 4"),
        ({"form": "block_shuffle", "blocks": 8}, "divide the inputs"),
    ],
)
def test_what_cannot_be_is_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        build({"outputs": 12, "inputs": 8, "bias": False, **numbers})


@EVERY
@pytest.mark.parametrize("whitened", [False, True])
def test_what_is_of_the_form_is_found_exactly(spec, whitened):
    weight = layer_of(spec, tensors_of(spec)).dense()
    inputs = spec["inputs"]
    within = metric(3, inputs) if whitened else Metric.identity(inputs, weight)
    for refit in (0, 1):
        torch.testing.assert_close(projected(spec, weight, within, refit=refit), weight)


def test_a_kronecker_product_is_a_monarch_of_rank_one():
    outer, inner = normal(0, 3, 4), normal(1, 5, 2)
    weight = torch.kron(outer, inner)  # (15, 8)
    spec = {"form": "monarch", "outputs": 15, "inputs": 8} | {
        "in_blocks": 4, "out_blocks": 5, "rank": 1,
    }  # fmt: skip
    found = projected(spec, weight, Metric.identity(8, weight))
    torch.testing.assert_close(found, weight)


@pytest.mark.parametrize("wave", [torch.cos, torch.sin])
def test_fourier_behind_a_digit_reversal_is_a_monarch(wave):
    """A slice is e^i(a+b), of rank one; its real and imaginary part are of rank two each."""
    blocks, width = 4, 6
    size = blocks * width
    order = torch.arange(size).view(width, blocks).t().flatten()  # every fourth, then the next
    angles = 2 * math.pi / size * torch.outer(torch.arange(size), order).double()
    spec = {"form": "monarch", "outputs": size, "inputs": size} | {
        "in_blocks": blocks, "out_blocks": width, "rank": 2,
    }  # fmt: skip
    weight = wave(angles)
    torch.testing.assert_close(projected(spec, weight, Metric.identity(size, weight)), weight)
    plain = wave(2 * math.pi / size * torch.outer(torch.arange(size), torch.arange(size)).double())
    worse = projected(spec, plain, Metric.identity(size, weight))
    assert (worse - plain).norm() > 0.1 * plain.norm()


@EVERY
def test_projecting_twice_is_projecting_once(spec):
    weight, within = normal(5, spec["outputs"], spec["inputs"]), metric(6, spec["inputs"])
    for refit in (0, 1):
        once = projected(spec, weight, within, refit=refit)
        again = projected(spec, once, within, refit=refit)
        torch.testing.assert_close(again, once, rtol=1e-6, atol=1e-8)


@EVERY
def test_the_projection_loses_the_discarded_energies_where_blocks_are_apart(spec):
    before, behind, middle = FORMS[spec["form"]].blocks(spec)
    weight, within = normal(5, spec["outputs"], spec["inputs"]), apart(6, spec["inputs"], before)
    expected = 0.0
    for k, gram in enumerate(blocks_of(within.gram, before)):
        width = len(gram)
        factor = torch.linalg.cholesky(gram)
        places = torch.arange(k * middle, (k + 1) * middle) % behind
        for group in range(behind):
            part = weight[group::behind, k * width : (k + 1) * width] @ factor
            rank = int((places == group).sum())
            expected += float(torch.linalg.svdvals(part)[rank:].square().sum())
    for refit in (0, 1):
        found = within.error(weight - projected(spec, weight, within, refit=refit))
        assert found == pytest.approx(expected, rel=1e-8, abs=1e-10)


@pytest.mark.parametrize("spec", [SPECS[1], SPECS[6]], ids=lambda s: s["form"])
def test_no_gradient_finds_a_better_one(spec):
    before = FORMS[spec["form"]].blocks(spec)[0]
    weight, within = normal(5, spec["outputs"], spec["inputs"]), apart(6, spec["inputs"], before)
    best = within.error(weight - projected(spec, weight, within))
    for seed in range(2):
        layer = layer_of(spec, tensors_of(spec, seed)).requires_grad_(True)
        steps = torch.optim.LBFGS(layer.parameters(), max_iter=50, line_search_fn="strong_wolfe")

        def loss(layer=layer, steps=steps):
            steps.zero_grad()
            difference = weight - layer.dense()
            value = torch.einsum("oi,ij,oj->", difference, within.gram, difference)
            value.backward()
            return value

        steps.step(loss)
        assert best <= loss().item() * (1 + 1e-9)


@EVERY
def test_a_refit_is_the_least_squares_fit_behind_the_first_factor(spec):
    weight, within = normal(5, spec["outputs"], spec["inputs"]), metric(6, spec["inputs"])
    plain = method_of(spec, refit=0).reshaped(weight, within, form(spec))
    fitted = method_of(spec, refit=1, ridge=0.0).reshaped(weight, within, form(spec))
    torch.testing.assert_close(fitted["first"], plain["first"])
    losses = [within.error(weight - layer_of(spec, t).dense()) for t in (plain, fitted)]
    assert losses[1] <= losses[0] * (1 + 1e-9) + 1e-12 * within.error(weight)
    layer = layer_of(spec, fitted).requires_grad_(True)
    difference = weight - layer.dense()
    torch.einsum("oi,ij,oj->", difference, within.gram, difference).backward()
    assert layer.second.grad.abs().max() < 1e-9 * within.error(weight)


def test_one_block_is_low_rank_in_the_metric_of_inputs():
    weight, within = normal(5, 10, 12), metric(6, 12)
    expected = torch.linalg.svdvals(weight @ torch.linalg.cholesky(within.gram)).square()[4:].sum()
    for spec in (
        {"form": "monarch", "in_blocks": 1, "out_blocks": 1, "rank": 4},
        {"form": "block_dense", "blocks": 1, "rank": 4},
    ):
        found = projected({"outputs": 10, "inputs": 12, **spec}, weight, within)
        assert within.error(weight - found) == pytest.approx(float(expected))
    spec = {"form": "low_rank", "outputs": 10, "inputs": 12, "rank": 4}
    assert SVDLLM(ridge=0.0).errors(weight, within, [form(spec)]) == pytest.approx(
        [float(expected)]
    )


@pytest.mark.parametrize(
    "spec",
    [
        {"form": "monarch", "in_blocks": 2, "out_blocks": 3, "rank": 4},
        {"form": "block_dense", "blocks": 3, "rank": 4},
        {"form": "block_shuffle", "blocks": 1},
    ],
    ids=lambda s: s["form"],
)
def test_full_rank_is_the_weight_itself(spec):
    weight, within = normal(5, 12, 12), metric(6, 12)
    found = projected({"outputs": 12, "inputs": 12, **spec}, weight, within)
    torch.testing.assert_close(found, weight)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_errors_of_all_forms_are_those_of_what_is_made(method):
    weight, within = normal(5, 48, 40), metric(6, 40, ridge=1e-6)
    made = method(ridge=1e-6)
    forms = made.forms(48, 40, True)
    found = made.errors(weight, within, forms)
    assert len(forms) > 1
    for form, error in zip(forms, found, strict=True):
        layer = layer_of(dict(form.spec) | {"bias": False}, made.reshaped(weight, within, form))
        assert error == pytest.approx(within.error(weight - layer.dense()))


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_inputs_that_never_were_and_weights_of_nothing_do_no_harm(method):
    weight, within = normal(5, 8, 8), metric(6, 8, ridge=1e-6)
    within.gram[:, 4:] = 0.0
    within.gram[4:] = 0.0
    for own in (weight, torch.zeros_like(weight)):
        for form in method().forms(8, 8, False):
            tensors = method().reshaped(own, within, form)
            assert all(bool(t.float().isfinite().all()) for t in tensors.values())
            layer = layer_of(dict(form.spec), tensors)
            assert within.error(own - layer.dense()) <= within.error(own) + 1e-12


def test_the_shuffle_is_part_of_what_a_block_shuffle_stands_for():
    """Two block-diagonal factors multiplied without it are another weight."""
    spec = SPECS[3]
    tensors = tensors_of(spec)
    layer = layer_of(spec, tensors)
    unshuffled = torch.block_diag(*tensors["second"]) @ torch.block_diag(*tensors["first"])
    x = normal(3, 4, spec["inputs"])
    torch.testing.assert_close(x @ layer.dense().mT, layer(x))
    assert (x @ unshuffled.mT - layer(x)).norm() > 0.5 * layer(x).norm()


@pytest.mark.parametrize(
    "spec",
    [
        {"form": "low_rank", "outputs": 12, "inputs": 8, "rank": 3},
        *(SPECS[i] for i in (0, 3, 6)),
    ],
    ids=lambda s: s["form"],
)
@torch.no_grad()
def test_few_tokens_meet_the_dense_weight_where_that_is_asked_for(spec):
    layer = layer_of(spec, tensors_of(spec), normal(9, spec["outputs"]))
    few, many = normal(1, 2, 2, spec["inputs"]), normal(2, 5, spec["inputs"])
    plain = [layer(x) for x in (few, many)]
    assert layer._made == ()
    layer.premerge(tokens=4)
    torch.testing.assert_close(layer(many), plain[1])
    assert layer._made == ()  # five tokens: factors
    torch.testing.assert_close(layer(few), plain[0])
    (kept,) = layer._made
    torch.testing.assert_close(kept, layer.dense())
    layer(few)
    assert layer._made[0] is kept
    assert "_made" not in layer.state_dict()
    layer.train()(few)
    assert layer._made == ()  # while factors change, they are what counts
    layer.eval()
    with torch.enable_grad():
        layer(few)
    assert layer._made == ()
    layer(few)
    next(layer.parameters()).mul_(2.0)
    layer.train().eval()
    torch.testing.assert_close(layer(few), few @ layer.dense().mT + layer.bias)
    layer.premerge(0)
    layer(few)
    assert layer._made == ()


def unit(outputs, inputs):
    return Matrix(
        name="w", block=0, size=1, step=1, hidden=8, least=1, paths=("w",),
        outputs=outputs, inputs=inputs, forms=(), order=0, published=True,
    )  # fmt: skip


def test_blocks_that_divide_nothing_are_refused_with_the_nearest_number():
    units = [unit(12, 8), unit(8, 12)]
    assert undivided(units, 4, both=True) is None
    assert undivided(units, 3, both=False) is None
    assert "try --blocks 4" in undivided(units, 5, both=True)
    assert "8×12, 12×8" in undivided(units, 5, both=True)
    assert "try --blocks 6" in undivided(units, 7, both=False)
    assert "try --blocks 1" in undivided([unit(3, 4)], 2, both=True)


def test_a_model_that_no_number_of_blocks_divides_says_so(opened):
    with pytest.raises(InputError, match=r"7 blocks don't divide .*try --blocks"):
        check_served(MonarchProjection(blocks=7), opened("llama"))
    assert BlockShuffleProjection().obstacle(opened("llama")) is None
    with pytest.raises(InputError, match=r"rank_step 5000 is above .*try --rank-step \d+"):
        check_served(BlockDenseProjection(rank_step=5000), opened("llama"))


def test_large_matrices_have_ranks_enough_and_no_more():
    """Each rank is refitted for its error: hundreds of them would take days."""
    for method in (MonarchProjection(), BlockDenseProjection()):
        forms = method.forms(4096, 4096, False)
        assert 16 <= len(forms) <= 32
        sizes = [form.numbers / 4096**2 for form in forms]
        assert sizes[0] < 0.07
        assert sizes[-1] > 0.9
        small = method.forms(64, 32, False)
        assert [form.spec["rank"] % 2 for form in small] == [0] * len(small)
