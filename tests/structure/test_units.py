"""What units say they cost is what the modules hold."""

from dataclasses import asdict
from functools import cache

import pytest
import torch

from secateur import MoDeGPT
from secateur.apply.surgery import narrow_block
from secateur.structure.costs import counted
from tests.support.families import BLOCKS, FAMILIES, NORMED, caches

TARGETS = {
    "parameters": "parameters",
    "bytes": "bytes",
    "flops": "flops_per_token",
    "cache": "cache_bytes_per_token",
}
every_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(scope="module")
def dense_model(opened):
    """Variant name to a model that no test changes."""
    return cache(opened)


def maps(block):
    attention = block.attention.module
    modules = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return [*modules, block.mlp.consumer, *(module for module, _ in block.mlp.producers)]


def held(block):
    """Parameters of the block's maps, but for the consumers' biases, which no size changes."""
    whole = sum(p.numel() for module in maps(block) for p in module.parameters())
    return whole - sum(
        m.bias.numel()
        for m in (block.attention.module.o_proj, block.mlp.consumer)
        if m.bias is not None
    )


def matrices(block):
    return sum(module.weight.numel() for module in maps(block))


@every_family
def test_full_units_are_all_weights_of_a_block(dense_model, name):
    model = dense_model(name)
    for block in model.blocks:
        units = block.units(8)
        parameters = sum(unit.parameters(unit.size) for unit in units)
        products = sum(unit.matrix_parameters(unit.size) for unit in units)
        if all(unit.kind != "query_key" for unit in units):
            attention = block.attention.module
            rest = attention.q_proj.weight.numel() + attention.k_proj.weight.numel()
            parameters, products = parameters + rest, products + rest
        assert parameters == held(block)
        assert products == matrices(block)


@every_family
@pytest.mark.parametrize("kind", ["mlp", "query_key", "value_output"])
def test_narrowing_saves_what_the_unit_says(opened, calibrated, name, kind):
    """Parameters, biases that appear or vanish, and the bytes of rotary indices.

    The first block's unit goes altogether, where it may, the second's is halved, the last loses
    one step."""
    model, method, store = opened(name), MoDeGPT(), calibrated(name).store
    for block in model.blocks:
        own = [unit for unit in block.units(8) if unit.kind == kind]
        if not own:
            pytest.skip("this family keeps that width")
        (unit,) = own
        narrower = unit.sizes()[:-1]
        size = narrower[(0, len(narrower) // 2, -1)[block.index]]
        before, products = sum(p.numel() for p in block.module.parameters()), matrices(block)
        statistics = store.get(block.index, method.needs)
        narrow_block(block, own, {unit.name: size}, method, statistics)
        after = sum(p.numel() for p in block.module.parameters())
        assert before - after == unit.parameters(unit.size) - unit.parameters(size)
        fewer = unit.matrix_parameters(unit.size) - unit.matrix_parameters(size)
        assert products - matrices(block) == fewer
        indices = sum(
            b.numel() * b.element_size()
            for n, b in block.module.named_buffers()
            if n.endswith("rope_pairs")
        )
        assert unit.index_bytes(size) == indices
        assert unit.index_bytes(unit.size) == 0


@every_family
def test_costs_add_up(dense_model, name):
    for unit in dense_model(name).units(8):
        for size in unit.sizes():
            cost = unit.cost(size, 2)
            assert cost.bytes == 2 * unit.parameters(size) + unit.index_bytes(size)
            assert cost.flops_per_token == 2 * unit.matrix_parameters(size)
            numbers = getattr(unit, "kv_heads", 0) * size
            if unit.kind == "value_output" and not size:
                numbers = 1  # by which the cache counts its tokens
            assert cost.cache_bytes_per_token == 2 * numbers * caches(name, unit.block)


@every_family
@pytest.mark.parametrize("target", TARGETS)
def test_counted_prices_are_costs_and_grow_with_size(dense_model, name, target):
    units = dense_model(name).units(8)
    for itemsize in (2, 4):
        prices = counted(units, target, itemsize)
        assert (prices.target, prices.fixed) == (target, 0)
        for unit in units:
            found = [prices.of(unit, size) for size in unit.sizes()]
            costs = [asdict(unit.cost(size, itemsize)) for size in unit.sizes()]
            assert found == [cost[TARGETS[target]] for cost in costs]
            assert found == sorted(found)
    sizes = {unit.name: unit.sizes()[len(unit.sizes()) // 2] for unit in units}
    prices = counted(units, target, 2)
    spent = sum(asdict(u.cost(sizes[u.name], 2))[TARGETS[target]] for u in units)
    assert prices.spent(units, sizes) == spent
    assert spent < prices.whole(units) or (target == "cache" and not caches(name, BLOCKS - 1))


@every_family
def test_a_unit_that_is_gone_costs_nothing_but_a_folded_bias(dense_model, name):
    for unit in dense_model(name).units(8):
        if unit.least:
            continue
        folded = unit.kind == "value_output" and unit.value_bias and not unit.output_bias
        assert unit.parameters(0) == (unit.hidden if folded else 0)
        assert unit.cost(0, 2).flops_per_token == 0
        kept = unit.kind == "value_output" and caches(name, unit.block)
        assert unit.cost(0, 2).cache_bytes_per_token == 2 * kept


@every_family
@pytest.mark.parametrize("multiple_of", [1, 8, 16, 100])
def test_sizes_are_multiples_of_the_step_or_the_full_one(dense_model, name, multiple_of):
    for unit in dense_model(name).units(multiple_of):
        assert unit.step == {"mlp": multiple_of, "query_key": 2, "value_output": 1}[unit.kind]
        # Values stay where queries and keys have to: nothing would read them.
        assert unit.least == (unit.kind == "value_output" and name in NORMED)
        multiples = [k for k in range(unit.least, unit.size) if k % unit.step == 0]
        assert unit.sizes() == [*multiples, unit.size]


def test_a_folded_bias_is_paid_for(opened, calibrated):
    """Qwen2's output has no bias of its own, so a narrowed value brings one."""
    model = opened("qwen2")
    unit = next(u for u in model.units(8) if u.kind == "value_output")
    per_rank = unit.hidden * (unit.heads + unit.kv_heads)
    assert unit.parameters(unit.size) == unit.size * (per_rank + unit.kv_heads)
    assert unit.parameters(3) == 3 * per_rank + unit.hidden
    block = model.blocks[0]
    narrow_block(
        block,
        [unit],
        {unit.name: 3},
        MoDeGPT(),
        calibrated("qwen2").store.get(0, MoDeGPT.needs),
    )
    assert block.attention.module.v_proj.bias is None
    assert block.attention.module.o_proj.bias.shape == torch.Size([unit.hidden])
