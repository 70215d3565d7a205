"""Integers: packing, rounding to nearest, GPTQ's sweep, and checkpoints that stock classes load."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from secateur import GPTQ, RTN, Budget, InputError, Settings, open_model
from secateur.evaluate import verify
from secateur.layers import integers
from secateur.layers.integers import Integers, packed, weight_of
from secateur.linalg.column_updates import inverse_factor, sweep
from secateur.linalg.int_rounding import best_scale, codes_of
from secateur.linalg.least_squares import DampingWarning
from secateur.methods import check_served
from secateur.methods.form import Metric
from secateur.methods.forms import Forms
from secateur.methods.rtn import width
from secateur.methods.svd_llm import SVDLLM
from secateur.planning.recipe import Recipe, Step
from secateur.structure.parametrizations import integer_form
from tests.apply.test_depth_checkpoint import write
from tests.support import families
from tests.support.raw import activations, gram_of, normal

BITS = range(3, 9)


def form(outputs, inputs, bits=4, group=8, scales="float64"):
    made = integer_form(outputs, inputs, False, bits, group)
    return replace(made, spec={**made.spec, "scales": scales})


def made(method, weight, metric, shape):
    """Codes, scales and the weight that they stand for."""
    found = method.reshaped(weight, metric, shape)
    return found["codes"], found["scale"], weight_of(found["codes"], found["scale"]).double()


def correlated(seed, inputs=32, tokens=400):
    return Metric(gram_of(activations(seed, tokens, inputs)))


def random_codes(bits, rows, columns, seed=0):
    half = 2 ** (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-half, half, (rows, columns), generator=generator).to(torch.int8)


# Packing


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [1, 31, 32, 45, 96])
def test_codes_of_a_row_follow_each_other_bit_by_bit(bits, columns):
    codes = random_codes(bits, 3, columns)
    found = packed(codes, bits)
    assert found.dtype == torch.int32
    assert found.shape == (3, math.ceil(columns * bits / 32))
    for row, words in zip(codes.tolist(), found.tolist(), strict=True):
        whole = sum((q + 2 ** (bits - 1)) << (i * bits) for i, q in enumerate(row))
        assert whole == sum((word % 2**32) << (32 * i) for i, word in enumerate(words))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [0, 11])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_the_library_unpacks_what_is_stored(bits, group, stored):
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.compressors.pack_quantized import pack_to_int32
    from compressed_tensors.quantization import QuantizationScheme

    weight = normal(bits, 6, 44) / 30
    shape = form(6, 44, bits, group, str(stored).removeprefix("torch."))
    identity = Metric.identity(44, weight)
    layer = RTN().layer(weight, identity, shape, None, torch.float32)
    config = integers.quantization_config({"model.1": layer, "2": torch.nn.Linear(2, 2)}, "model.")
    scheme = QuantizationScheme(**config["config_groups"]["group_0"])
    assert (scheme.targets, config["ignore"]) == ([r"re:(model\.)?1$"], ["2"])
    state = layer.state_dict()
    codes = RTN().reshaped(weight, identity, shape)["codes"]
    assert torch.equal(state["weight_packed"], pack_to_int32(codes, bits))
    unpacked = compressors.PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    assert unpacked.dtype == stored
    assert torch.equal(unpacked.float(), layer.weight)
    size = sum(t.numel() * t.element_size() for t in state.values())
    assert size == shape.bytes(stored.itemsize)


def test_what_is_stored_of_a_layer():
    weight, bias = normal(0, 4, 16), normal(1, 4).float()
    layer = RTN().layer(weight, Metric.identity(16, weight), form(4, 16), bias, torch.float32)
    assert set(layer.state_dict()) == {"weight_packed", "weight_scale", "weight_shape", "bias"}
    assert layer.weight_shape.tolist() == [4, 16]
    x = normal(2, 3, 16).float()
    assert torch.equal(layer(x), x @ layer.weight.t() + bias)


# Rounding to nearest


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [0, 8])
def test_multiples_of_a_scale_are_recovered(bits, group):
    codes = random_codes(bits, 5, 32)
    codes[:, ::8] = 2 ** (bits - 1) - 1  # reached in every group
    codes.clamp_min_(1 - 2 ** (bits - 1))
    scale = 2.0 ** -torch.arange(5 * (4 if group else 1)).view(5, -1).double()
    weight = weight_of(codes, scale)
    found, own, _ = made(RTN(), weight, Metric.identity(32, weight), form(5, 32, bits, group))
    assert torch.equal(found, codes)
    assert torch.equal(own, scale)


def test_every_code_is_the_nearest_for_the_scale_that_is_stored():
    """The mistake: dividing by the scale before it is rounded, which 8 bits in bfloat16 notice."""
    weight = normal(3, 64, 128)
    shape = form(64, 128, 8, 0, "bfloat16")
    found = RTN().reshaped(weight, Metric.identity(128, weight), shape)
    scale = found["scale"].double()
    assert found["scale"].dtype == torch.bfloat16
    inside = weight.abs() < 127 * scale
    off = (found["codes"].double() * scale - weight).abs() / scale
    assert float(off[inside].max()) <= 0.5 + 1e-12
    assert bool(inside.any())


def test_more_scales_are_never_worse_and_one_clips_nothing():
    groups = normal(4, 50, 32)
    before = None
    for steps in (1, 2, 4, 20):
        scale = best_scale(groups, 3, steps, torch.float64).unsqueeze(-1)
        error = (groups - codes_of(groups, scale, 3) * scale).square().sum(-1)
        if before is None:
            assert bool(((groups.abs() / scale).amax(-1) <= 3 + 1e-12).all())
        else:
            assert bool((error <= before).all())  # each grid holds the ones before it
            assert float(error.sum()) < float(before.sum())
        before = error


def test_groups_without_weights_get_a_scale_that_can_be_divided_by():
    for stored, size in ((torch.float64, 0.0), (torch.float16, 1e-9)):
        scale = best_scale(torch.full((2, 8), size).double(), 4, 5, stored)
        assert bool((scale == 1).all())


def test_more_bits_lose_less_and_smaller_groups_too():
    weight = normal(5, 16, 64)
    identity = Metric.identity(64, weight)
    shapes = [form(16, 64, bits, 16) for bits in BITS]
    errors = RTN().errors(weight, identity, shapes)
    assert all(a > 2 * b for a, b in pairwise(errors))
    by_group = RTN().errors(weight, identity, [form(16, 64, 4, g) for g in (0, 32, 8)])
    assert by_group == sorted(by_group, reverse=True)


# The sweep


def test_one_column_is_made_good_as_the_optimal_brain_surgeon_would():
    gram, weight = correlated(6, 9).gram, normal(7, 4, 9)
    factor = inverse_factor(gram, 0.0)
    costs = factor.diagonal() ** -2

    def begin(first, block):
        return lambda i, now: now[:, i].round() if first + i == 0 else now[:, i]

    for size in (2, 4, 9):
        found = sweep(weight, factor, size, begin)
        inverse = torch.linalg.inv(gram)
        error = weight[:, 0] - weight[:, 0].round()
        expected = weight - torch.outer(error, inverse[0]) / inverse[0, 0]
        assert torch.allclose(found, expected, atol=1e-10)
        lost = float(error.square().sum() * costs[0])
        assert Metric(gram).error(found - weight) == pytest.approx(lost)


@pytest.mark.parametrize("size", [1, 4, 12])
def test_costs_add_up_over_a_sweep(size):
    gram, weight = correlated(8, 12).gram, normal(9, 4, 12)
    factor = inverse_factor(gram, 0.0)
    costs = factor.diagonal() ** -2
    lost = []

    def begin(first, block):
        def settle(i, now):
            lost.append(float((now[:, i] - now[:, i].round()).square().sum() * costs[first + i]))
            return now[:, i].round()

        return settle

    found = sweep(weight, factor, size, begin)
    assert torch.equal(found, found.round())
    assert Metric(gram).error(found - weight) == pytest.approx(sum(lost))


# GPTQ


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("group", [0, 8])
@pytest.mark.parametrize("act_order", [0, 1])
def test_inputs_that_have_nothing_to_do_with_each_other_are_rounded_to_nearest(
    bits, group, act_order
):
    weight = normal(10, 7, 32)
    identity, shape = Metric.identity(32, weight), form(7, 32, bits, group, "bfloat16")
    one = GPTQ(act_order=act_order).reshaped(weight, identity, shape)
    other = RTN().reshaped(weight, identity, shape)
    assert torch.equal(one["codes"], other["codes"])
    assert torch.equal(one["scale"], other["scale"])


@pytest.mark.parametrize("act_order", [0, 1])
def test_it_loses_less_than_rounding_to_nearest(act_order):
    sums = {}
    for seed in range(6):
        weight, metric = normal(seed, 24, 32), correlated(seed)
        shapes = [form(24, 32, bits, group) for bits in (3, 4) for group in (0, 8, 32)]
        for method in (RTN(), GPTQ(act_order=act_order)):
            errors = method.errors(weight, metric, shapes)
            sums.setdefault(method.name, torch.zeros(len(shapes)))
            sums[method.name] += torch.tensor(errors)
    assert bool((sums["gptq"] < 0.85 * sums["rtn"]).all()), sums


@pytest.mark.parametrize("act_order", [0, 1])
def test_multiples_are_recovered_in_any_order(act_order):
    """The mistake: codes, or their scales, left in the order of the sweep."""
    codes = random_codes(4, 6, 32, 1)
    codes[:, ::8] = 7
    codes.clamp_min_(-7)
    scale = 2.0 ** -torch.arange(24).view(6, 4).double()
    method = GPTQ(act_order=act_order, scale_steps=1)
    found = method.reshaped(weight_of(codes, scale), correlated(11), form(6, 32))
    assert torch.equal(found["codes"], codes)
    assert torch.equal(found["scale"], scale)


def test_a_singular_gram_gets_a_larger_ridge_aloud():
    """The mistake: an identity in the place of an inverse that fails, which is plain rounding."""
    weight, metric = normal(12, 16, 32), Metric(gram_of(activations(13, 8, 32)))
    shape = form(16, 32)
    with pytest.warns(DampingWarning, match="GPTQ"):
        *_, found = made(GPTQ(ridge=0.0), weight, metric, shape)
    *_, plain = made(RTN(), weight, metric, shape)
    assert metric.error(found - weight) < 0.2 * metric.error(plain - weight)


def test_inputs_that_calibration_never_saw_keep_their_weights():
    x = activations(14, 200, 16)
    x[:, 5] = 0
    weight = normal(15, 8, 16)
    *_, found = made(GPTQ(), weight, Metric(gram_of(x)), form(8, 16, 8))
    assert float((found - weight)[:, 5].abs().max()) < 0.05


# What can be asked for


@pytest.mark.parametrize(
    ("bits", "nearby"), [("2", "3"), ("4,9", "4,8"), ("four", "3"), ("", "3"), ("4;8", "3")]
)
def test_bits_that_are_none_are_refused(bits, nearby):
    with pytest.raises(InputError, match=f"between 3 and 8.*try {nearby}\\."):
        RTN(bits=bits)


def test_levels_are_those_asked_for():
    shapes = RTN(bits="8, 3,4,4", group="16").forms(8, 32, False)
    assert [shape.label for shape in shapes] == ["int3-g16", "int4-g16", "int8-g16"]
    assert {width(shape) for shape in shapes} == {16}
    assert all(shape.stock for shape in shapes)


def test_groups_that_divide_no_inputs_are_refused_with_those_that_do(opened):
    model = opened("llama")  # 32 and 56 inputs
    with pytest.raises(InputError, match=r"groups of 24 .* 16 for 32 inputs, 28 for 56 inputs"):
        check_served(RTN(group="24"), model)
    some = [unit for unit in RTN(group="32").units(model, 1) if unit.size > 1]
    assert {unit.inputs for unit in some} == {32}
    assert RTN(group="32").obstacle(model) is None


def test_without_the_library_nothing_is_begun(opened, monkeypatch):
    monkeypatch.setattr(integers, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pip install 'secateur\[integers\]'"):
        check_served(GPTQ(group="8"), opened("llama"))


def test_nothing_can_follow_integers_in_a_recipe():
    last, first = Step.of(GPTQ()), Step.of(SVDLLM(), Budget(keep=0.5))
    assert [step.method.name for step in Recipe((first, last)).steps] == ["svd-llm", "gptq"]
    for method in (GPTQ(), Forms(of="svd-llm,rtn")):
        with pytest.raises(InputError, match=f"behind {method.name}, which leaves integers"):
            Recipe((Step.of(method), first))


def test_mixtures_offer_integers_with_scales_of_the_checkpoint(opened):
    model = opened("gpt2")
    units = Forms(of="rtn,svd").units(model, 1)
    forms = {unit.paths[0]: [f for f in unit.forms if f.by == "rtn"] for unit in units}
    assert forms["attn.q_proj"]
    assert forms["mlp.c_fc"] == []  # a Conv1D
    assert {f.spec["scales"] for own in forms.values() for f in own} == {"float32"}
    linears = {linear.path: linear for linear in model.blocks[0].linear_layers}
    offered = {path: RTN(group="8").offered([linear], model) for path, linear in linears.items()}
    assert offered["mlp.c_fc"] == []
    assert [form.spec["scales"] for form in offered["attn.q_proj"]] == ["float32"]


# Checkpoints


def packed_bytes(folder):
    """Bytes of all tensors of packed layers."""
    found = 0
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            if name.rpartition(".")[2] in ("weight_packed", "weight_scale", "weight_shape"):
                tensor = file.get_tensor(name)
                found += tensor.numel() * tensor.element_size()
    return found


@pytest.mark.parametrize("name", ["qwen3", "phi3", "opt", "gpt2"])
def test_what_is_loaded_again_says_the_same(tmp_path, name):
    """Mixed bits, and matrices that stay; attention that stock classes have in other matrices.

    The mistake: a stock attention written where one of its parts is packed.
    """
    pytest.importorskip("compressed_tensors")
    dense = families.save(families.random_model(name), tmp_path / "dense", torch.bfloat16)
    settings = Settings(device="cpu", dtype="float32")
    model, method = open_model(dense, settings), GPTQ(bits="3,4,8", group="8")
    units = method.units(model, 1)
    sizes = {u.name: u.size if u.block == 0 else 1 + i % u.size for i, u in enumerate(units)}
    plan, memory, tokens = write(model, method, sizes, tmp_path / "small")
    assert plan.tier == ("plain" if name == "qwen3" else "per-layer")
    assert plan.libraries == ["compressed-tensors"]
    if name == "gpt2":
        assert {u.size for u in units if "mlp" in u.paths[0]} == {1}  # Conv1Ds
    again = open_model(tmp_path / "small", settings)
    assert not any(isinstance(module, Integers) for module in again.module.modules())
    assert {p.dtype for p in again.module.parameters()} == {torch.float32}
    assert verify.disagreement(memory, verify.reference_outputs(again, tokens)) is None
    assert packed_bytes(tmp_path / "small") == sum(r.bytes for r in plan.units if r.form)


STRANGER = """
import sys
sys.modules["secateur"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
folder, given, said = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
assert type(model).__module__ == "transformers.models.llama.modeling_llama"
assert model.dtype == torch.bfloat16
ids = load_file(given)["ids"]
with torch.inference_mode():
    half = model(ids).logits[0].float()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    single = model(ids).logits[0]
save_file({"logits.bfloat16.eager": half, "logits.float32.eager": single}, said)
"""


def test_stock_classes_alone_say_what_the_model_in_memory_said(tmp_path):
    pytest.importorskip("compressed_tensors")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=families.VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    stock = transformers.LlamaForCausalLM(config)
    dense = families.save(stock, tmp_path / "dense", torch.bfloat16)
    model, method = open_model(dense, Settings(device="cpu", dtype="float32")), GPTQ(group="32")
    sizes = {unit.name: 1 for unit in method.units(model, 1)}
    plan, memory, tokens = write(model, method, sizes, tmp_path / "small")
    assert plan.tier == "plain"
    assert not list((tmp_path / "small").glob("*.py"))
    saved = json.loads((tmp_path / "small" / "config.json").read_text())
    assert saved["model_type"] == "llama"
    (scheme,) = saved["quantization_config"]["config_groups"].values()
    assert len(scheme["targets"]) == 14
    assert saved["quantization_config"]["ignore"] == ["lm_head"]
    save_file({"ids": tokens.ids}, tmp_path / "ids.safetensors")
    files = [str(tmp_path / name) for name in ("small", "ids.safetensors", "said.safetensors")]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", STRANGER, *files]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    said = load_file(tmp_path / "said.safetensors")
    for name, logits in said.items():
        assert torch.equal(logits, memory[name]), name
