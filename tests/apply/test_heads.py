"""Whole KV heads: what they cost, what is left without some, and what reads and makes an axis."""

from functools import cache

import pytest
import torch

from secateur.apply.surgery import narrow_unit, narrowed
from secateur.models.linear_ops import inputs_by_outputs
from secateur.structure.narrowing import Narrowing
from secateur.structure.units import WHOLE_HEADS
from tests.contract.conftest import logits
from tests.support.blocks import axis
from tests.support.families import FAMILIES, WHOLE, caches, read

every_family = pytest.mark.parametrize("name", FAMILIES)
COSTS = ("parameters", "bytes", "flops_per_token", "cache_bytes_per_token")


@pytest.fixture(scope="module")
def shared(opened):
    """Variant name to a model that every test leaves as it was."""
    return cache(lambda name: opened(name, "float64"))


def unit_of(block, kind, biased=False, multiple_of=8):
    (unit,) = block.units(multiple_of, (kind,), biased)
    return unit


def chosen(unit, size, seed=0):
    """Any ``size`` channels or heads, ascending, and those that go."""
    order = torch.randperm(unit.size, generator=torch.Generator().manual_seed(seed))
    return order[:size].sort().values, order[size:].sort().values


def states(block, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(
        2, 9, block.attention.module.o_proj.out_features, generator=generator
    ).double()


# What they cost


@every_family
def test_whole_heads_cost_what_their_widths_cost(shared, name):
    block = shared(name).blocks[1]
    attention, heads = block.attention.module, unit_of(block, "heads")
    widths = [unit for unit in block.units(8) if unit.kind != "mlp"]
    whole, parts = heads.cost(heads.size, 4), [unit.cost(unit.size, 4) for unit in widths]
    added = {field: sum(getattr(part, field) for part in parts) for field in COSTS}
    if len(widths) == 1:  # queries and keys are no unit here, but cost the same
        linears = (attention.q_proj, attention.k_proj)
        weights = sum(linear.weight.numel() for linear in linears)
        numbers = sum(p.numel() for linear in linears for p in linear.parameters())
        added["parameters"] += numbers
        added["bytes"] += 4 * numbers
        added["flops_per_token"] += 2 * weights
        if caches(name, 1):
            added["cache_bytes_per_token"] += 4 * attention.kv_heads * attention.query_key
    assert {field: getattr(whole, field) for field in COSTS} == added
    gone = heads.cost(0, 4)
    assert (gone.parameters, gone.flops_per_token) == (0, 0)
    assert gone.cache_bytes_per_token == 4 * caches(name, 1)


@every_family
@pytest.mark.parametrize("kind", WHOLE_HEADS)
@pytest.mark.parametrize("biased", [False, True])
def test_the_module_holds_what_the_unit_counts_at_every_size(shared, name, kind, biased):
    """Weights, biases of what goes, and a new bias of the reader where it had none."""
    block = shared(name).blocks[1]
    unit = unit_of(block, kind, biased)
    reader = block.mlp.consumer if kind == "mlp" else block.attention.module.o_proj
    assert unit.new_bias == (biased and reader.bias is None)

    def held():
        return sum(p.numel() for p in block.module.parameters())

    before, whole = held(), unit.cost(unit.size, 2).parameters
    constant = torch.ones(unit.hidden, dtype=torch.float64) if biased else None
    for size in unit.sizes()[:-1]:
        with narrowed(block, unit, Narrowing(keep=chosen(unit, size)[0], bias=constant)):
            cost = unit.cost(size, 2)
            assert before - held() == whole - cost.parameters
            assert cost.bytes == 2 * cost.parameters
            attention = block.attention.module
            if kind == "heads" and size:
                assert (attention.kv_heads, attention.heads) == (size, size * unit.group)
    assert held() == before


# What is left without some


def without_columns(block, gone):
    """Switch off what the output projection reads of some KV heads, for as long as it takes."""
    attention = block.attention.module
    weight, each = attention.o_proj.weight, axis(block, "heads").read().shape[1]
    columns = (gone.unsqueeze(1) * each + torch.arange(each)).flatten()
    weight[:, columns] = 0


@every_family
@pytest.mark.parametrize("size", [1, -1])
def test_fewer_heads_are_zeroed_columns_of_the_output(opened, name, size):
    """And a constant is added; a model of zeroed weights says the same as one of fewer heads."""
    masked, sliced = opened(name, "float64"), opened(name, "float64")
    for one, other in zip(masked.blocks, sliced.blocks, strict=True):
        unit = unit_of(other, "heads", biased=True)
        if unit.fixed:
            assert "heads" in other.attention.views["heads"].obstacle
            return
        keep, gone = chosen(unit, size % unit.size, one.index)
        constant = torch.randn(unit.hidden, generator=torch.Generator().manual_seed(1)).double()
        narrow_unit(other, unit, Narrowing(keep=keep, bias=constant))
        without_columns(one, gone)
        old = one.attention.module.o_proj.bias
        bias = constant if old is None else old + constant
        one.attention.module.o_proj.bias = torch.nn.Parameter(bias, requires_grad=False)
    found, expected = (logits(m.module, read(name, 1, 20)) for m in (sliced, masked))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in WHOLE])
@pytest.mark.parametrize("biased", [False, True])
def test_without_any_head_the_output_is_constant(shared, name, biased):
    block = shared(name).blocks[1]
    unit, old = unit_of(block, "heads", biased), block.attention.module.o_proj.bias
    constant = torch.arange(unit.hidden).double() if biased else None
    with narrowed(block, unit, Narrowing(keep=torch.arange(0), bias=constant)):
        attention = block.attention.module
        assert attention.q_proj.weight.shape == attention.k_proj.weight.shape == (0, unit.hidden)
        with torch.inference_mode():
            output, _ = attention(states(block))
    expected = torch.zeros(unit.hidden).double() if old is None else old.double()
    if constant is not None:
        expected = expected + constant
    if name == "bert":  # which has the sum and its norm inside
        expected = block.attention.stock.output.LayerNorm(states(block) + expected)
    torch.testing.assert_close(output, expected.expand_as(output))


# What reads and what makes an axis


@every_family
@pytest.mark.parametrize("kind", WHOLE_HEADS)
def test_read_is_what_the_reader_multiplies(shared, name, kind):
    """Coordinates of KV heads are those of all query heads that read them, in their order."""
    block = shared(name).blocks[1]
    reader = block.mlp.consumer if kind == "mlp" else block.attention.module.o_proj
    rows, unit = axis(block, kind).read(), unit_of(block, kind)
    assert len(rows) == unit.size
    values = torch.randn(7, len(rows) * rows.shape[1], dtype=torch.float64)
    expected = reader(values) - (0 if reader.bias is None else reader.bias)
    found = torch.einsum("tsc,sco->to", values.view(7, *rows.shape[:2]), rows)
    torch.testing.assert_close(found, expected)
    if kind == "heads":
        group = block.attention.module.num_key_value_groups
        assert torch.equal(
            rows.unflatten(1, (group, -1)).flatten(0, 1), block.attention.output_rows
        )


def maps(block, kind):
    attention = block.attention.module
    if kind == "heads":
        return [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return [*(module for module, _ in block.mlp.producers), block.mlp.consumer]


@every_family
@pytest.mark.parametrize("kind", WHOLE_HEADS)
def test_every_parameter_that_goes_is_listed_once(opened, name, kind):
    """The numbers that narrowing takes away are those listed for what goes, none twice."""
    block, count = opened(name, "float64").blocks[1], 1
    for parameter in (p for module in maps(block, kind) for p in module.parameters()):
        flat = torch.arange(count, count + parameter.numel(), dtype=parameter.dtype)
        parameter.copy_(flat.view_as(parameter))
        count += parameter.numel()

    def numbers():
        *makers, reader = maps(block, kind)
        found = [reader.weight, *(p for maker in makers for p in maker.parameters())]
        return sorted(torch.cat([p.flatten() for p in found]).tolist())  # its bias stays

    before, unit = numbers(), unit_of(block, kind)
    views = axis(block, kind).parameters()
    assert all(view.shape[0] == unit.size for view in views)
    keep, _ = chosen(unit, max(1, unit.size // 2))
    listed = torch.cat([view.reshape(unit.size, -1) for view in views], 1)
    assert sorted(listed.flatten().tolist()) == before
    for view in views:  # a change of what is listed is one of the model
        view[keep[0]] *= -1
    assert sum(number < 0 for number in numbers()) == listed.shape[1]
    for view in views:
        view[keep[0]] *= -1
    narrow_unit(block, unit, Narrowing(keep=keep))
    assert numbers() == sorted(listed[keep].flatten().tolist())
    if kind == "mlp":  # in one order: a channel's numbers stand in one place of all
        rows = inputs_by_outputs(block.mlp.consumer)
        assert torch.equal(rows, views[-1][keep])
