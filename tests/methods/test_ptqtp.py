"""PTQTP: two planes of trits and their scales, packed five trits to a byte."""

from itertools import product

import pytest
import torch

from secateur import PTQTP, InputError
from secateur.layers.factored_secateur import Ternary, packed_trits, unpacked_trits
from secateur.layers.forms_secateur import build, fill
from secateur.linalg.ternary import PAIRS, best_scales, errors, nearest_trits
from secateur.methods import check_served
from secateur.methods.form import Metric
from tests.support.raw import normal


def planted(groups=60, size=64, seed=0, ratio=0.25):
    """Weights made of two planes, with all nine pairs in every group."""
    generator = torch.Generator().manual_seed(seed)
    trits = torch.randint(-1, 2, (2, groups, size), generator=generator).double()
    trits[:, :, : len(PAIRS)] = torch.tensor(PAIRS).t().unsqueeze(1)
    first = torch.rand(groups, generator=generator).double() + 0.1
    scales = torch.stack((first, ratio * first))
    return scales, trits, (scales.unsqueeze(-1) * trits).sum(0)


def left_over(groups, found):
    return errors(groups, *found) / groups.square().sum(1)


def layer_of(method, weight, dtype=torch.float64):
    (form,) = method.forms(*weight.shape, False)
    identity = Metric.identity(weight.shape[1], weight)
    return form, method.layer(weight, identity, form, None, dtype)


# Packing


@pytest.mark.parametrize("count", [1, 4, 5, 64])
def test_five_trits_are_a_number_to_base_three(count):
    generator = torch.Generator().manual_seed(count)
    trits = torch.randint(-1, 2, (2, 3, count), generator=generator)
    codes = packed_trits(trits)
    assert codes.dtype == torch.uint8
    assert codes.shape == (2, 3, -(-count // 5))
    assert int(codes.max()) < 3**5
    assert torch.equal(unpacked_trits(codes, count), trits)
    digits = (trits[0, 0, :5] + 1).tolist()
    assert int(codes[0, 0, 0]) == sum(digit * 3**i for i, digit in enumerate(digits))


def test_a_layer_computes_with_its_dense_weight_and_is_loaded_bit_for_bit():
    weight = normal(0, 6, 40)
    form, layer = layer_of(PTQTP(groups="20"), weight, torch.float32)
    scales, trits = layer.scales.double(), unpacked_trits(layer.codes, 40)
    expected = sum(scales[i].repeat_interleave(20, 1) * trits[i] for i in range(2))
    assert torch.allclose(layer.dense().double(), expected, atol=1e-7)
    x = normal(1, 3, 40).float()
    assert torch.equal(layer(x), x @ layer.dense().t())
    state = layer.state_dict()
    stored = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    assert stored == form.bytes(4)
    assert form.parameters == weight.numel()
    again = build(form.spec)
    again.load_state_dict(state)
    assert torch.equal(again.dense(), layer.dense())
    again = fill(form.spec, state, None, torch.bfloat16)
    assert again.scales.dtype == torch.bfloat16
    assert torch.equal(again.codes, layer.codes)


def test_two_planes_take_3_45_bits_a_weight():
    form = PTQTP().forms(4096, 5120, False)[0]
    assert form.bytes(2) * 8 / (4096 * 5120) == pytest.approx(3.45)
    assert not form.stock
    assert form.multiplications == 4096 * 5120


@pytest.mark.parametrize("change", [{"group": 24}, {"group": 0}, {"group": 128}, {"rank": 2}])
def test_a_spec_that_is_none_is_refused(change):
    spec = {"form": "trits", "outputs": 4, "inputs": 64, "bias": False, "group": 16}
    Ternary.check(spec)
    with pytest.raises(ValueError, match="group"):
        Ternary.check(spec | change)


# The fit


def test_scales_are_least_squares():
    groups, trits = normal(2, 30, 16), planted(30, 16, 3)[1]
    found = best_scales(groups, trits, 1e-12)
    for i in range(30):
        expected = torch.linalg.lstsq(trits[:, i].t(), groups[i].unsqueeze(1)).solution
        assert torch.allclose(found[:, i], expected[:, 0], atol=1e-8)


def test_two_equal_planes_share_their_scale():
    """The system of the paper's start, which is singular but for its ridge."""
    groups = normal(4, 5, 32)
    signs = groups.sign().expand(2, -1, -1)
    for ridge in (1e-12, 1e-8):
        found = best_scales(groups, signs, ridge)
        assert torch.equal(found[0], found[1])
        assert torch.allclose(found.sum(0), groups.abs().mean(1), rtol=1e-4)
    assert torch.equal(best_scales(groups, torch.zeros_like(signs), 1e-8), torch.zeros(2, 5))


def test_every_weight_takes_the_best_of_nine_pairs():
    groups, scales = normal(5, 8, 20), normal(6, 2, 8)
    found = nearest_trits(groups, scales)
    for i, j in product(range(8), range(20)):
        tried = {p: (groups[i, j] - p[0] * scales[0, i] - p[1] * scales[1, i]).abs() for p in PAIRS}
        assert tuple(found[:, i, j].int().tolist()) == min(tried, key=tried.__getitem__)
    assert sorted(PAIRS) == sorted(product((-1, 0, 1), repeat=2))


def test_ties_are_settled_so_that_planes_differ_and_signs_do_not_matter():
    groups = torch.tensor([[1.0, -1.0, 0.0, 2.0, -2.0]]).double()
    first, second = nearest_trits(groups, torch.ones(2, 1).double())
    assert first.tolist() == [[1, -1, 0, 1, -1]]
    assert second.tolist() == [[0, 0, 0, 1, -1]]


def test_no_turn_raises_the_error():
    groups = normal(7, 200, 32)
    groups = groups / groups.square().mean(1, keepdim=True).sqrt()
    starts = (groups.sign().expand(2, -1, -1), planted(200, 32)[1])
    for start in starts:
        before = errors(groups, best_scales(groups, start, 1e-8), start)
        for turns in range(1, 12):
            *_, error = PTQTP(turns=turns).alternated(groups, start)
            assert bool((error <= before).all()), turns
            before = error
        assert float(error.sum()) < 0.2 * float(groups.square().sum())


@pytest.mark.parametrize("ratio", [0.25, 0.75])  # 0.5 has several pairs for a level
def test_planes_that_are_there_are_recovered(ratio):
    scales, _, groups = planted(ratio=ratio)
    found, planes = PTQTP().fitted(groups)
    assert float(left_over(groups, (found, planes)).max()) < 1e-12
    assert torch.allclose(found.sort(0).values, scales.sort(0).values)  # in either order


def test_planes_of_any_ratio_are_recovered_mostly():
    groups = torch.cat([planted(20, seed=i, ratio=i / 20)[2] for i in range(1, 20)])
    exact = left_over(groups, PTQTP(ratios=9).fitted(groups)) < 1e-12
    assert float(exact.double().mean()) > 0.9


def test_a_second_start_is_never_worse():
    groups = normal(8, 300, 64)
    alone, both = (left_over(groups, PTQTP(ratios=n).fitted(groups)) for n in (0, 3))
    assert bool((both <= alone * (1 + 1e-12)).all())
    assert float(both.mean()) < 0.96 * float(alone.mean())


def test_the_size_of_the_weights_does_not_matter():
    """The mistake: ending where scales move by less than an ε that is not relative to them."""
    groups = normal(9, 100, 64)
    one, planes = PTQTP(ratios=0).fitted(groups)
    other, others = PTQTP(ratios=0).fitted(groups * 2.0**-12)
    assert torch.equal(planes, others)
    assert torch.allclose(one * 2.0**-12, other, rtol=1e-12)


def test_groups_of_zeros_stay_zero():
    found, _ = PTQTP().fitted(torch.zeros(3, 16).double())
    assert torch.equal(found, torch.zeros(2, 3).double())


def test_two_planes_lie_between_integers_of_three_and_four_bits():
    """On normal weights; at as many bits as four take, integers are better."""
    from secateur import RTN
    from secateur.structure.parametrizations import integer_form

    weight = normal(10, 16, 256)
    identity = Metric.identity(256, weight)
    (form,) = PTQTP().forms(16, 256, False)
    (own,) = PTQTP().errors(weight, identity, [form])
    shapes = [integer_form(16, 256, False, bits, 128) for bits in (3, 4)]
    for shape in shapes:
        shape.spec["scales"] = "float32"
    three, four = RTN().errors(weight, identity, shapes)
    assert four < own < three
    assert shapes[0].bytes(2) < form.bytes(2) < shapes[1].bytes(2)


# What can be asked for


def test_smaller_groups_are_levels_of_more_bytes_and_less_error():
    method, weight = PTQTP(groups="16,64"), normal(11, 8, 64)
    forms = method.forms(8, 64, True)  # a layer with a bias, which no error is of
    assert [form.label for form in forms] == ["trits/16", "trits/64"]
    small, large = method.errors(weight, Metric.identity(64, weight), forms)
    assert small < large
    assert forms[0].bytes(2) > forms[1].bytes(2)
    assert [form.label for form in method.forms(8, 48, True)] == ["trits/16"]


def test_groups_that_divide_nothing_are_refused(opened):
    with pytest.raises(InputError, match=r"groups of 128 .* 32 for 32 inputs, 56 for 56 inputs"):
        check_served(PTQTP(), opened("llama"))
    with pytest.raises(InputError, match="groups='1' should be whole numbers between 2"):
        PTQTP(groups="1")
    assert PTQTP(groups="8").obstacle(opened("llama")) is None
