"""One dictionary for layers that read the same: who shares, what is stored, where rows go."""

import copy

import pytest
import torch
from torch import nn

from secateur.layers.forms_secateur import build
from secateur.methods.compot import COMPOT
from secateur.methods.cospadi import CoSpaDi
from secateur.methods.dsformer import DSFormer
from secateur.methods.form import Metric, stacked
from secateur.models.block import Linear
from secateur.models.linear_ops import dense_weight
from secateur.structure.parametrizations import form_of
from tests.methods.test_dictionary import metric, normal, sparse

INPUTS = 16


def linear(path, weight, bias=None):
    layer = nn.Linear(weight.shape[1], len(weight), bias=bias is not None, dtype=torch.float64)
    layer.weight.data = weight
    if bias is not None:
        layer.bias.data = bias
    return Linear(path, layer.requires_grad_(False), "attention_inputs", None, False, 0, True)


def group(*weights):
    """Layers ``a.x0``, ``a.x1``, … the second of them with a bias."""
    biases = [normal(90, len(w)) if i == 1 else None for i, w in enumerate(weights)]
    every = zip(weights, biases, strict=True)
    return [linear(f"a.x{i}", weight, bias) for i, (weight, bias) in enumerate(every)]


def form(outputs, atoms, nonzeros, blocks=1):
    spec = {"form": "dictionary", "outputs": outputs, "inputs": INPUTS, "bias": False}
    return form_of({**spec, "blocks": blocks, "atoms": atoms, "nonzeros": nonzeros}, "")


def test_a_planted_dictionary_of_several_layers_is_found_and_every_row_goes_to_its_layer():
    within = metric(6, INPUTS)
    basis = torch.linalg.qr(normal(1, INPUTS, INPUTS)).Q @ within.whitening[1]
    layers = group(
        *(sparse(seed, rows, INPUTS, 2) @ basis for seed, rows in ((2, 40), (4, 120), (6, 30)))
    )
    method = COMPOT(ridge=0.0, sweeps=200, share=1)
    weight = stacked(layers)
    made = method.replacing(layers, weight, within, form(190, 16, 2))
    assert list(made) == ["a.x0", "a.x1", "a.x2"]
    for old in layers:
        new, own = made[old.path], old.module.weight
        assert within.error(own - dense_weight(new)) < 1e-12 * within.error(own)
        x = normal(7, 3, INPUTS)
        torch.testing.assert_close(new(x), old.module(x))


@pytest.mark.parametrize("blocks", [1, 4])
def test_a_group_costs_what_its_layers_store_and_the_largest_has_the_atoms(blocks):
    layers = group(normal(1, 24, INPUTS), normal(2, 56, INPUTS), normal(3, 24, INPUTS))
    method = DSFormer(ridge=0.0, blocks=blocks, share=1) if blocks > 1 else CoSpaDi(share=1)
    shape = form(104, 30, 3, blocks)  # more atoms than the smaller layers have rows
    made = method.replacing(layers, stacked(layers), metric(6, INPUTS), shape)
    assert [layer.form for layer in made.values()] == ["codes", "dictionary", "codes"]
    assert made["a.x0"].spec["of"] == "a.x1"
    states = [layer.to(torch.float16).state_dict() for layer in made.values()]
    stored = sum(t.nbytes for state in states for n, t in state.items() if n != "bias")
    assert stored == shape.bytes(2)
    assert [("first" in state) for state in states] == [False, True, False]
    values = 2 * blocks * 104 * 3
    kept = min(3, -(-30 // 8)) * blocks * 104  # indices of a byte, or masks
    assert stored == values + kept + 2 * 30 * INPUTS


def test_the_error_of_a_group_is_the_sum_of_its_layers():
    layers, within = group(normal(1, 24, INPUTS), normal(2, 40, INPUTS)), metric(6, INPUTS)
    method, shape, weight = CoSpaDi(share=1, ridge=0.0), form(64, 12, 4), stacked(layers)
    made = method.replacing(layers, weight, within, shape)
    each = [within.error(x.module.weight - dense_weight(made[x.path])) for x in layers]
    assert method.errors(weight, within, [shape])[0] == pytest.approx(sum(each), rel=1e-9)


def test_sharing_pays_where_layers_have_few_rows():
    """At equal bytes atoms are cheaper by the number of layers; rows are drawn from one set."""
    within = Metric.identity(INPUTS, normal(0, 1))
    basis = normal(1, 24, INPUTS)
    layers = group(*(sparse(seed, 32, 24, 2) @ basis for seed in (2, 4, 6)))
    shared, alone = CoSpaDi(share=1), CoSpaDi()
    together = form(96, 20, 4)
    lost = shared.errors(stacked(layers), within, [together])[0]
    apart = form(32, 10, 3)
    assert together.bytes(2) <= 3 * apart.bytes(2)
    each = sum(alone.errors(x.module.weight, within, [apart])[0] for x in layers)
    assert lost < 0.5 * each


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_layers_that_read_the_same_are_one_unit(opened, name):
    model = opened(name)
    alone, shared = CoSpaDi(grain=3).units(model, 1), CoSpaDi(grain=3, share=1).units(model, 1)
    own = [unit for unit in shared if unit.block == 1]
    attention, mlp = model.blocks[1].anatomy.attention, model.blocks[1].anatomy.consumer
    assert own[0].name == f"layers.1.{attention}.q_proj+k_proj+v_proj"
    assert own[0].paths == tuple(f"{attention}.{n}_proj" for n in "qkv")
    assert own[1].paths == (f"{attention}.o_proj",)
    assert own[-1].paths == (mlp,)
    assert len(own) == 4  # what makes an MLP's channels is one, or one of two
    whole = [sum(unit.cost(unit.size, 2).bytes for unit in units) for units in (alone, shared)]
    assert whole[0] == whole[1]


def test_atoms_are_no_more_than_the_rows_of_the_layer_that_has_them(opened):
    model = opened("llama")
    for unit in CoSpaDi(grain=64, share=1).units(model, 1):
        linears = [x for x in model.blocks[unit.block].linear_layers if x.path in unit.paths]
        rows = max(x.module.out_features for x in linears)
        assert unit.forms
        assert all(found.spec["atoms"] <= rows for found in unit.forms)


def test_a_copied_block_reads_the_copied_atoms():
    layers = group(normal(1, 24, INPUTS), normal(2, 40, INPUTS))
    made = CoSpaDi(share=1).replacing(layers, stacked(layers), metric(6, INPUTS), form(64, 12, 4))
    block = nn.ModuleList(made.values())
    other = copy.deepcopy(block)
    before = other[0].dense()
    other[1].first.data.mul_(2)
    torch.testing.assert_close(other[0].dense(), 2 * before)
    torch.testing.assert_close(block[0].dense(), before)
    half = block.to(torch.bfloat16)
    assert half[0].dense().dtype == torch.bfloat16


CODES = {"form": "codes", "outputs": 9, "inputs": 6, "bias": False, "of": "a"}
CODES |= {"blocks": 1, "atoms": 5, "nonzeros": 3}
ATOMS = {**{k: v for k, v in CODES.items() if k != "of"}, "form": "dictionary", "outputs": 20}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"of": "b"}, "'b' is no dictionary"),
        ({"of": "codes"}, "'codes' is no dictionary"),  # itself
        ({"of": "linear"}, "'linear' is no dictionary"),
        ({"of": 3}, "path of a linear as 'of'"),
        ({"atoms": 4}, "as many inputs, blocks and atoms"),
        ({"inputs": 12}, "as many inputs, blocks and atoms"),
        ({"blocks": 2}, "as many inputs, blocks and atoms"),
    ],
)
def test_codes_without_their_atoms_are_refused(changes, words):
    with torch.device("meta"):
        there = {"a": build(ATOMS), "linear": nn.Linear(6, 9)}
        with pytest.raises(ValueError, match=words):
            _following({**CODES, **changes}, there)
        _following(CODES, there)


def _following(spec, there):
    codes = build(spec)
    codes.follow({**there, "codes": codes})
