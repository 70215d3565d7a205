"""What methods make of coordinates that they are told to keep."""

import pytest
import torch

from secateur.methods import METHODS, method_class
from secateur.utils.errors import InputError

SELECTING = [name for name in METHODS if method_class(name).selects]


def narrowings(method, opened, calibrated, name):
    """Every unit that is selected, and its solution, at about half its size."""
    model, data = opened(name), calibrated(name)
    for unit in method.units(model, 2):
        if unit.kind in method.selects and not unit.fixed:
            block = model.blocks[unit.block]
            with block.solving():
                given = data.store.get(unit.block, method.needs, model.exact_device)
                size = min(unit.sizes(), key=lambda size: abs(size - unit.size / 2))
                yield unit, method.solve(unit, block, given), size


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("method", SELECTING)
def test_what_it_chose_itself_gives_the_same(opened, calibrated, method, name):
    found = list(narrowings(method_class(method)(), opened, calibrated, name))
    assert found
    for unit, solution, size in found:
        own = solution.at(size)
        assert own.keep.shape == unit.index_shape(size)
        again = solution.keeping(own.keep)
        for part in ("keep", "encode", "consumer", "bias"):
            was, now = getattr(own, part), getattr(again, part)
            assert (was is None) == (now is None)
            assert was is None or torch.equal(was, now)


@pytest.mark.parametrize("method", SELECTING)
def test_other_coordinates_are_kept_as_told(opened, calibrated, method):
    for unit, solution, size in narrowings(method_class(method)(), opened, calibrated, "llama"):
        if unit.kind == "query_key":
            half = torch.arange(unit.size // 2)[-(size // 2) :]
            told = torch.cat((half, half + unit.size // 2)).expand(*unit.index_shape(size))
        else:
            told = torch.arange(unit.size)[-size:]
        found = solution.keeping(told)
        assert torch.equal(found.keep, told)
        if found.consumer is not None and size < unit.size:
            assert not torch.equal(found.consumer, solution.at(size).consumer) or torch.equal(
                solution.at(size).keep, told
            )


@pytest.mark.parametrize("method", ["auto", "modegpt"])
def test_a_coordinate_without_its_partner_is_refused(opened, calibrated, method):
    made = method_class(method)()
    for unit, solution, size in narrowings(made, opened, calibrated, "llama"):
        if unit.kind == "query_key":
            told = torch.arange(size).expand(*unit.index_shape(size)).clone()
            with pytest.raises(InputError, match="stay or go together"):
                solution.keeping(told)
            break
    else:
        raise AssertionError("no pairs")


def test_a_method_that_mixes_coordinates_says_so(opened, calibrated):
    made = method_class("modegpt")()
    assert "value_output" not in made.selects
    model, data = opened("llama"), calibrated("llama")
    unit = next(u for u in made.units(model, 2) if u.kind == "value_output")
    block = model.blocks[unit.block]
    with block.solving():
        given = data.store.get(unit.block, made.needs, model.exact_device)
        solution = made.solve(unit, block, given)
    with pytest.raises(InputError, match="can't be told"):
        solution.keeping(torch.arange(2))
