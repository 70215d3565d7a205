"""What methods that refit readers of channels and heads share, with biases and without."""

from dataclasses import replace

import pytest
import torch

from secateur import Store, calibrate
from secateur.apply.sequential import watched
from secateur.apply.surgery import narrow_block, narrowed
from secateur.calibration.layer_stream import Stream
from secateur.data.tokens import Tokens
from secateur.methods.ispasp import ISpaSP
from secateur.methods.obspa import OBSPA
from secateur.methods.ziplm import ZipLM
from tests.support.families import stream
from tests.support.raw import activations, lost, normal, solved

METHODS = [ZipLM(), OBSPA(), ISpaSP(), ISpaSP(refit=1)]
every = pytest.mark.parametrize(
    "method", METHODS, ids=lambda m: f"{m.name}{getattr(m, 'refit', '')}"
)


@pytest.fixture(scope="module")
def measured(opened):
    """Variant name to a model in float64, its tokens and statistics."""

    def of(name):
        model, ids = opened(name, "float64"), stream(400).view(10, 40)
        tokens, store = Tokens(ids, torch.ones_like(ids, dtype=torch.bool)), Store()
        calibrate(model, tokens, ZipLM.needs, store)
        return model, tokens, store

    return of


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("ridge", [0.0, 0.01, 0.7])
@pytest.mark.parametrize("kind", [ZipLM, OBSPA])
def test_curve_is_the_error_on_the_activations(kind, ridge, width):
    """However large the ridge; the mistake: counting as error what the ridge adds to it."""
    x, w = activations(1, 120, 12), normal(2, 12, 4)
    solution = solved(kind(ridge=ridge), x, w, width)
    whole = float((x @ w).square().sum() / len(x))
    for size in range(12 // width + 1):
        share = lost(x, w, solution.at(size), width) / whole
        assert solution.curve.at(size) == pytest.approx(share, rel=1e-7, abs=1e-12)


@every
@pytest.mark.parametrize("kind", ["mlp", "heads"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "opt"])
def test_curve_is_the_error_that_a_narrowed_module_makes(measured, method, name, kind):
    """On the model; the mistake: value biases of heads that are gone, or refitted, are lost."""
    model, tokens, store = measured(name)
    block, windows = model.blocks[0], Stream(model, tokens)
    unit = next(u for u in method.units(model, 8) if u.kind == kind and u.block == 0)
    solution = method.solve(unit, block, store.get(0, method.needs))

    def output():
        with torch.no_grad(), watched(block) as seen:
            windows.through(block, windows.at(slice(None)))
        return seen.mlp if kind == "mlp" else seen.attention

    dense = output()
    with narrowed(block, unit, solution.at(0)):
        constant = output()
    energy = (dense - constant).square().sum()
    assert float((constant - constant[0, 0]).abs().max()) < 1e-12
    for size in sorted({unit.size // 4, unit.size // 2, unit.size - 1} - {0}):
        with narrowed(block, unit, solution.at(size)):
            share = float((output() - dense).square().sum() / energy)
        assert 0 <= share < 1  # a ReLU may be silent on so little text
        if size % -(-unit.size // 16) == 0:  # where i-SpaSP's curve is no guess
            assert solution.curve.at(size) == pytest.approx(share, rel=1e-5)
    assert torch.equal(output(), dense)


@every
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_an_output_bias_is_paid_for_where_it_is_new(measured, method, name):
    """Values of Qwen2 have biases and its outputs none."""
    model, _, store = measured(name)
    units = [unit for unit in method.units(model, 8) if unit.block == 0]
    assert {u.kind: u.new_bias for u in units} == {"mlp": False, "heads": name == "qwen2"}
    block = model.blocks[0]
    parts = [block.attention.module, *(p for p, _ in block.mlp.producers), block.mlp.consumer]

    def count():
        now = [block.attention.module, *parts[1:]]
        return sum(p.numel() for part in now for p in part.parameters())

    before, sizes = count(), {u.name: u.size // 2 for u in units}
    narrow_block(block, units, sizes, replace(method), store.get(0, method.needs))
    saved = sum(u.cost(u.size, 4).parameters - u.cost(u.size // 2, 4).parameters for u in units)
    assert before - count() == saved
