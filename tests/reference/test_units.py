"""What units say they cost is what the modules hold."""

import pytest
import torch

from secateur import MoDeGPT
from secateur.apply import narrow_block
from tests.families import FAMILIES

every_family = pytest.mark.parametrize("name", FAMILIES)


def held(block):
    """Parameters of the block's maps, but for the consumers' biases, which no size changes."""
    attention = block.attention
    modules = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    modules += [block.consumer, *(module for module, _ in block.producers)]
    whole = sum(p.numel() for module in modules for p in module.parameters())
    return whole - sum(
        m.bias.numel() for m in (attention.o_proj, block.consumer) if m.bias is not None
    )


@every_family
def test_full_units_are_all_weights_of_a_block(opened, name):
    model = opened(name)
    for block in model.blocks:
        units = block.units(8)
        counted = sum(unit.parameters(unit.size) for unit in units)
        if all(unit.kind != "query_key" for unit in units):
            attention = block.attention
            counted += attention.q_proj.weight.numel() + attention.k_proj.weight.numel()
        assert counted == held(block)


@every_family
@pytest.mark.parametrize("kind", ["mlp", "query_key", "value_output"])
def test_narrowing_saves_what_the_unit_says(opened, calibrated, name, kind):
    """Parameters, biases that appear or vanish, and the bytes of rotary indices."""
    model, method, store = opened(name), MoDeGPT(), calibrated(name).store
    for block in model.blocks:
        own = [unit for unit in block.units(8) if unit.kind == kind]
        if not own:
            pytest.skip("this family keeps that width")
        (unit,) = own
        size = unit.sizes()[block.index % (len(unit.sizes()) - 1)]
        before = sum(p.numel() for p in block.module.parameters())
        statistics = store.get(block.index, method.needs)
        narrow_block(block, own, {unit.name: size}, method, statistics)
        after = sum(p.numel() for p in block.module.parameters())
        assert before - after == unit.parameters(unit.size) - unit.parameters(size)
        indices = sum(
            b.numel() * b.element_size()
            for n, b in block.module.named_buffers()
            if n.endswith("rope_pairs")
        )
        assert unit.index_bytes(size) == indices
        assert unit.index_bytes(unit.size) == 0


@every_family
def test_costs_add_up(opened, name):
    for unit in opened(name).units(8):
        for size in (unit.sizes()[0], unit.size):
            cost = unit.cost(size, 2)
            assert cost.bytes == 2 * unit.parameters(size) + unit.index_bytes(size)
            assert cost.flops_per_token == 2 * unit.matrix_parameters(size)
            heads = getattr(unit, "kv_heads", 0)
            assert cost.cache_bytes_per_token == 2 * heads * size
        prices = [unit.parameters(size) for size in unit.sizes()]
        assert prices == sorted(prices)


@every_family
@pytest.mark.parametrize("multiple_of", [1, 8, 16, 100])
def test_sizes_are_multiples_of_the_step_or_the_full_one(opened, name, multiple_of):
    for unit in opened(name).units(multiple_of):
        sizes = unit.sizes()
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == unit.size
        assert all(size % unit.step == 0 and size > 0 for size in sizes[:-1])


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
    assert block.attention.v_proj.bias is None
    assert block.attention.o_proj.bias.shape == torch.Size([unit.hidden])
