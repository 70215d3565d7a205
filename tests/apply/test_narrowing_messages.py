"""What one rank has solved is the same on the others."""

import pytest
import torch

from secateur.apply.narrowing_messages import as_message, from_message
from secateur.distributed.messages import pack, unpack
from secateur.layers.factored_secateur import Factored
from secateur.layers.integers import packed, unpacked
from secateur.methods import method_class
from secateur.methods.forms import reshaping
from secateur.models.linear_ops import dense_weight
from secateur.structure.units import Matrix
from tests.contract.variants import VARIANTS


def passed(narrowing):
    """As it arrives on another rank."""
    content, tensors = pack(as_message(narrowing))
    message, room = unpack(content, torch.device("cpu"))
    for there, tensor in zip(room, tensors, strict=True):
        there.copy_(tensor)
    return from_message(message)


@pytest.mark.parametrize("name", [*reshaping(), "cospadi shared"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])  # without biases, and with
def test_layers_of_every_form_arrive_as_they_were(opened, calibrated, family, name):
    method = method_class(name.removesuffix(" shared"))(**VARIANTS.get(name, {}))
    model = opened(family)
    unit = next(u for u in method.units(model, 1) if isinstance(u, Matrix) and u.forms)
    block = model.blocks[unit.block]
    statistics = calibrated(family).store.get(unit.block, method.needs)
    with torch.no_grad(), block.solving():
        solution = method.solve(unit, block, statistics)
        for size in {1, unit.size - 1}:
            narrowing = solution.at(size)
            found = passed(narrowing)
            assert found.layers.keys() == narrowing.layers.keys() == {*unit.paths}
            for path, layer in narrowing.layers.items():
                other = found.layers[path]
                assert type(other) is type(layer)
                state, there = layer.state_dict(), other.state_dict()
                assert state.keys() == there.keys()
                for key, tensor in state.items():
                    assert there[key].dtype == tensor.dtype, key
                    assert torch.equal(there[key], tensor), key
                assert torch.equal(dense_weight(other), dense_weight(layer))
                assert not any(p.requires_grad for p in other.parameters())
                if isinstance(layer, Factored):
                    assert other.spec == layer.spec


def test_widths_arrive_as_they_were(opened, calibrated):
    method, model = method_class("modegpt")(), opened("llama")
    for unit in method.units(model, 1):
        if unit.block:
            continue
        statistics = calibrated("llama").store.get(0, method.needs)
        with torch.no_grad(), model.blocks[0].solving():
            narrowing = method.solve(unit, model.blocks[0], statistics).at(unit.sizes()[0])
        found = passed(narrowing)
        for part in ("keep", "encode", "consumer", "bias"):
            own, there = getattr(narrowing, part), getattr(found, part)
            assert (own is None) == (there is None), part
            assert own is None or torch.equal(own, there), part


@pytest.mark.parametrize("bits", range(3, 9))
@pytest.mark.parametrize("columns", [1, 31, 32, 33, 100])
def test_packed_codes_are_read_again(bits, columns):
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (7, columns), generator=torch.Generator().manual_seed(bits))
    assert torch.equal(unpacked(packed(codes, bits), bits, columns), codes)
