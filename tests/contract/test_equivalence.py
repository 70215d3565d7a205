"""Masked equals sliced: a narrowed model says what hooks on the untouched stock model say."""

import pytest
import torch

from secateur.apply.surgery import narrow_block
from tests.contract import virtual
from tests.contract.conftest import by_blocks, logits, narrowing, spread
from tests.support.families import FAMILIES, NORMED, PARTIAL, ROTARY, read


def narrowings(model, calibrated, name, kind, share, method):
    """The method's narrowings, of another size in every block, and the sizes by unit."""
    chosen, sizes = {}, {}
    store = calibrated(name).store
    for block in model.blocks:
        statistics = store.get(block.index, method.needs)
        chosen[block.index] = {}
        for unit in block.units(4, method.kinds, method.biased):
            sizes[unit.name] = unit.size
            if kind in (unit.kind, "all") and not unit.fixed:
                wanted = (share + 0.12 * block.index) * unit.size
                least = 0 if unit.kind == "block" else unit.step  # of size 1: it stays or goes
                size = max(s for s in unit.sizes() if s <= max(wanted, least))
                sizes[unit.name] = size
                chosen[block.index][unit.kind] = method.solve(unit, block, statistics).at(size)
    return chosen, sizes


def sliced(model, calibrated, name, sizes, method):
    store = calibrated(name).store
    for block in model.blocks:
        statistics = store.get(block.index, method.needs)
        units = block.units(4, method.kinds, method.biased)
        narrow_block(block, units, sizes, method, statistics)
    return model.module


@by_blocks()
@pytest.mark.parametrize("share", [0.3, 0.65])
@pytest.mark.parametrize("name", FAMILIES)
def test_masked_equals_sliced(opened, calibrated, stock, method, name, share):
    """Of each kind that the method narrows in this family, and of all of them."""
    made = method()
    units, given = [u for u in made.units(opened(name), 4) if not u.fixed], read(name, 1, 24, 1)
    for kind in (*dict.fromkeys(u.kind for u in units), "all"):
        model = opened(name, "float64")
        chosen, sizes = narrowings(model, calibrated, name, kind, share, made)
        with virtual.narrowed(stock(name), name, chosen) as masked:
            expected = logits(masked, given)
        found = logits(sliced(model, calibrated, name, sizes, made), given)
        assert spread(found, expected) < 1e-5, kind
        assert spread(found, logits(stock(name), given)) > 1e-2, kind  # something was removed


@narrowing("query_key")
@pytest.mark.parametrize("name", sorted(set(FAMILIES) - NORMED))
def test_softmax_scale_stays_that_of_the_dense_heads(opened, calibrated, method, name):
    """The mistake: scaling scores by the narrowed width changes the softmax's temperature."""
    made = method()
    model = opened(name, "float64")
    dense = [block.attention.module.scaling for block in model.blocks]
    _, sizes = narrowings(model, calibrated, name, "query_key", 0.5, made)
    module = sliced(model, calibrated, name, sizes, made)
    assert [block.attention.module.scaling for block in model.blocks] == dense
    right = logits(module, read(name, 1, 24, 1))
    for block in model.blocks:
        narrowed = block.attention.module.query_key / block.layout.width
        block.attention.module.scaling = block.attention.module.scaling * narrowed**-0.5
    assert spread(logits(module, read(name, 1, 24, 1)), right) > 1e-2


@narrowing("query_key")
@pytest.mark.parametrize("name", sorted(ROTARY - NORMED))
def test_kept_pairs_turn_by_their_own_frequency(opened, calibrated, method, name):
    """The mistake: turning the kept pairs by the first k/2 frequencies."""
    made = method()
    model = opened(name, "float64")
    _, sizes = narrowings(model, calibrated, name, "query_key", 0.5, made)
    module = sliced(model, calibrated, name, sizes, made)
    right, moved = logits(module, read(name, 1, 24, 1)), False
    for block in model.blocks:
        if block.layout.rotary == 0:
            continue
        pairs = block.attention.module.rope_pairs
        first = torch.arange(pairs.shape[1]).expand_as(pairs)
        moved |= not torch.equal(first, pairs)
        pairs.copy_(first)
    assert moved
    assert spread(logits(module, read(name, 1, 24, 1)), right) > 1e-3


@narrowing("query_key")
@pytest.mark.parametrize("name", sorted(PARTIAL))
def test_coordinates_at_rest_stay_at_rest(opened, calibrated, method, name):
    """Scores between tokens depend on their distance alone through the pairs that turn."""
    made = method()
    model = opened(name, "float64")
    _, sizes = narrowings(model, calibrated, name, "query_key", 0.5, made)
    sliced(model, calibrated, name, sizes, made)
    for block in model.blocks:
        table = block.layout.rotary // 2
        pairs, keep = block.attention.module.rope_pairs, None
        assert pairs.max() <= table
        cos = torch.rand(1, 5, 2 * table).double()
        tables, _ = block.attention.module.rotary_tables(cos, cos)
        resting = (pairs == table).unsqueeze(1).expand(-1, 5, -1)
        assert bool((tables[0][resting] == 1).all())
        keep = pairs[pairs < table]
        assert len(keep) + int((pairs == table).sum()) == pairs.numel()


@narrowing("value_output")
@pytest.mark.parametrize(
    "name", ["qwen2", "opt", "gpt2", "gpt_neox", "llama_biased_tied", "bert", "vit"]
)
def test_value_bias_is_folded_into_the_output_bias(opened, calibrated, method, name):
    made = method()
    model = opened(name, "float64")
    before = [
        (
            b.attention.module.v_proj.bias.clone(),
            b.attention.module.o_proj.weight.clone(),
            b.attention.module,
        )
        for b in model.blocks
    ]
    old = [None if a.o_proj.bias is None else a.o_proj.bias.clone() for *_, a in before]
    _, sizes = narrowings(model, calibrated, name, "value_output", 0.3, made)
    sliced(model, calibrated, name, sizes, made)
    for block, (bias, weight, attention), output in zip(model.blocks, before, old, strict=True):
        group = attention.num_key_value_groups
        spelled = bias.view(attention.kv_heads, -1).repeat_interleave(group, 0).flatten()
        expected = weight @ spelled + (0 if output is None else output)
        assert block.attention.module.v_proj.bias is None
        torch.testing.assert_close(block.attention.module.o_proj.bias, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "mistral"])
def test_gated_gram_is_that_of_the_product(stock, calibrated, name):
    """The mistake: a Gram of act(gate) alone, so that up takes no part in the choice."""
    from secateur.calibration.needs import Needs

    model, data = stock(name), calibrated(name)
    mlp = model.base_model.layers[0].mlp
    seen = []
    handle = mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits(model, data.tokens.ids)
    handle.remove()
    x = seen[0].flatten(0, 1)
    if hasattr(mlp, "gate_up_proj"):
        gate, up = mlp.gate_up_proj(x).chunk(2, -1)
    else:
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    act = torch.nn.functional.silu(gate)
    gram = data.store.get(0, [Needs.HIDDEN_GRAM])[Needs.HIDDEN_GRAM].mean
    right, wrong = ((h.t() @ h) / len(h) for h in (act * up, act))
    torch.testing.assert_close(gram, right, rtol=1e-6, atol=1e-8)
    assert spread(wrong, gram) > 0.1
