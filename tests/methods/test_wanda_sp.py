"""Wanda-sp: its score written out, and statistics that come from behind the narrowed blocks."""

import pytest
import torch

from secateur import calibrate
from secateur.apply.sequential import narrow_blocks
from secateur.apply.surgery import narrow_block
from secateur.calibration.collect import Store
from secateur.data.tokens import sample
from secateur.methods.wanda_sp import WandaSP
from secateur.structure.units import WHOLE_HEADS
from tests.support.blocks import axis
from tests.support.families import stream

some_families = pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "qwen3", "opt"])


def read(model, block, kind, tokens):
    """What reads an axis reads: (tokens, size, coordinates of each)."""
    seen, reader = [], block.mlp.consumer if kind == "mlp" else block.attention.module.o_proj
    hook = reader.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.inference_mode():
        model.module(input_ids=tokens.ids, use_cache=False)
    hook.remove()
    values = seen[0].reshape(*tokens.mask.shape, -1)[tokens.mask]
    return values.view(-1, *axis(block, kind).read().shape[:2])


def by_hand(model, block, kind, tokens):
    """‖x_j‖ / √tokens · mean |W_j|, summed over the coordinates of each."""
    values, rows = read(model, block, kind, tokens), axis(block, kind).read()
    norms = values.double().square().mean(0).sqrt()
    return torch.stack(
        [
            sum(norms[i, j] * rows[i, j].abs().sum() / rows.shape[2] for j in range(rows.shape[1]))
            for i in range(len(rows))
        ]
    )


@some_families
@pytest.mark.parametrize("kind", WHOLE_HEADS)
def test_scores_are_norms_times_mean_weights(opened, calibrated, name, kind):
    """A value's bias is a part of what is read. Without it the scores of heads would be others."""
    model, data = opened(name, "float64"), calibrated(name)
    block = model.blocks[1]
    (unit,) = block.units(4, (kind,))
    statistics = data.store.get(1, WandaSP.needs)
    found = WandaSP().scores(unit, block, statistics)
    torch.testing.assert_close(found, by_hand(model, block, kind, data.tokens), rtol=1e-5, atol=0)
    bias = block.attention.module.v_proj.bias
    if kind == "heads" and bias is not None:
        block.attention.module.v_proj.bias = None
        wrong = WandaSP().scores(unit, block, statistics)
        block.attention.module.v_proj.bias = bias
        assert float((wrong / found - 1).abs().max()) > 1e-2


@some_families
def test_the_best_scores_stay_as_they_were(opened, calibrated, name):
    made, block = WandaSP(), opened(name, "float64").blocks[1]
    statistics = calibrated(name).store.get(1, made.needs)
    for unit in block.units(4, made.kinds, made.biased):
        assert not unit.new_bias
        scores = made.scores(unit, block, statistics)
        narrowing = made.solve(unit, block, statistics).at(unit.size // 2)
        gone = [i for i in range(unit.size) if i not in narrowing.keep.tolist()]
        assert scores[narrowing.keep].min() >= scores[gone].max()
        assert narrowing.bias is narrowing.consumer is None


# Behind what is narrowed


def half(units):
    return {unit.name: max(1, unit.size // 2 // unit.step) * unit.step for unit in units}


def kept(dense, narrow):
    """Which channels of an MLP are left, told by their rows of what reads them."""
    return [(dense == row).all(1).nonzero().item() for row in narrow]


@pytest.fixture
def tokens():
    return sample(stream(6 * 32), 6, 32, 0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_each_block_is_judged_behind_the_narrowed_ones(opened, tokens, name):
    """The mistake of the public code of FLAP: every block judged on what the dense model gives."""
    made, model, other = WandaSP(), opened(name, "float64"), opened(name, "float64")
    dense = [block.mlp.consumer_weight for block in model.blocks]
    units = made.units(model, 8)
    sizes = half(units)
    store = Store()
    calibrate(opened(name, "float64"), tokens, made.needs, store)
    differs = 0
    line = narrow_blocks(model, made, units, sizes, tokens, store)
    for block, twin in zip(line, other.blocks, strict=True):
        own = [unit for unit in units if unit.block == block.index]
        for unit in own:  # the twin's earlier blocks are narrowed, it is not
            scores = by_hand(other, twin, unit.kind, tokens)
            wanted = scores.topk(sizes[unit.name]).indices.sort().values
            if unit.kind == "mlp":
                assert kept(dense[block.index], block.mlp.consumer_weight) == wanted.tolist()
                there = made.scores(unit, twin, store.get(block.index, made.needs))
                best = there.topk(sizes[unit.name]).indices.sort().values
                differs += best.tolist() != wanted.tolist()
                assert block.index or not differs  # nothing is narrowed before the first
        again = Store()
        calibrate(other, tokens, made.needs, again)
        narrow_block(twin, own, sizes, made, again.get(block.index, made.needs))
        for one, two in zip(block.module.parameters(), twin.module.parameters(), strict=True):
            assert torch.equal(one, two)
    assert differs  # or the dense model's statistics would have done
