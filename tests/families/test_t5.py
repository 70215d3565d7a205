"""T5: two stacks side by side, and the position bias that their blocks hand on."""

from dataclasses import replace

import pytest
import torch

from secateur import Store, calibrate
from secateur.apply.sequential import watched
from secateur.apply.surgery import narrow_unit
from secateur.calibration.gradients import LOSS
from secateur.calibration.layer_stream import Stream
from secateur.calibration.needs import Need, Needs
from secateur.calibration.statistics import Gram
from secateur.evaluate.verify import attend_by
from secateur.models.attention import Attention
from secateur.structure.sites import Site
from tests.calibration.test_pair_scores import form_of, rescaled
from tests.contract.conftest import logits, spread
from tests.support import t5
from tests.support.families import HEADS, HIDDEN
from tests.support.t5 import (
    D_KV,
    DECODER,
    READ,
    WRITTEN,
    layer_of,
    narrowings,
    opened,
    own_part,
    rows,
    same,
    stock_of,
)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "gated"])
def folder(request, tmp_path_factory):
    return t5.made(request.param, tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return t5.made(False, tmp_path_factory.mktemp("plain"))


# The two stacks


def test_blocks_compute_what_the_stock_model_computes(folder):
    model, stock = opened(folder), stock_of(folder)
    assert [unit.name for unit in model.units(8, ("mlp",))] == [f"layers.{i}.mlp" for i in range(5)]
    assert same(model.module, stock, rows(2))


def test_streams_are_the_stock_models_states_block_by_block(folder, monkeypatch):
    """The mistakes: blocks behind the first without its position bias; a decoder that reads the
    encoder's embeddings, or its states without the norm behind them."""
    monkeypatch.setattr("secateur.calibration.layer_stream.TOKENS_PER_BATCH", 2 * (READ + WRITTEN))
    model, stock, tokens = opened(folder), stock_of(folder), rows(5)
    seen = {}
    for index in range(5):
        layer_of(stock, index).register_forward_hook(
            lambda _, __, output, i=index: seen.__setitem__(i, output[0])
        )
    expected, line = logits(stock, tokens), Stream(model, tokens)
    assert len(line.batches) == 3
    embedded = line.states.clone()
    for block in model.blocks:
        before = line.states.clone()
        line.advance(block)
        own = own_part(block.index)
        torch.testing.assert_close(line.states[:, own], seen[block.index], rtol=1e-5, atol=1e-5)
        other = own_part(DECODER if block.index < DECODER else 0)
        assert torch.equal(line.states[:, other], before[:, other])
    found = torch.cat([line.logits(batch, line.at(batch)) for batch in line.batches])
    assert spread(found, expected) < 1e-5
    without = line.states.clone()
    without[:, READ:] = embedded[:, READ:]
    assert spread(line.logits(slice(0, 2), without[:2]), expected[:2]) > 0.1


def test_another_encoder_is_read_by_the_decoder_behind_it(plain):
    """The mistake: what the decoder was called with when the stream began."""
    model, tokens = opened(plain), rows(2)
    line = Stream(model, tokens)
    for block in model.blocks[:DECODER]:
        line.advance(block)
    block, states = model.blocks[DECODER], line.at(slice(0, 2))
    moved = states.clone()
    moved[:, :READ] += 1
    before, after = (line.through(block, s)[:, READ:] for s in (states, moved))
    assert spread(after, before) > 0.01


def test_statistics_are_of_a_blocks_own_part(folder):
    """The mistake: positions of the other stack among a block's own."""
    model, stock, tokens = opened(folder), stock_of(folder), rows(6)
    between, store = Need(Site("block", "behind"), Gram), Store()
    needs = frozenset({Needs.HIDDEN_GRAM, Needs.MIXED_GRAM, Needs.CHANGE, between})
    calibrate(model, tokens, needs, store)
    seen, blocks = {}, {}
    for index in range(5):
        layer = layer_of(stock, index)
        places = {
            Needs.HIDDEN_GRAM: layer.layer[-1].DenseReluDense.wo,
            Needs.MIXED_GRAM: layer.layer[0].SelfAttention.o,
        }
        for need, module in places.items():
            module.register_forward_pre_hook(
                lambda _, args, key=(index, need): seen.__setitem__(key, args[0])
            )
        layer.register_forward_hook(
            lambda _, args, out, i=index: blocks.__setitem__(i, (args[0], out[0]))
        )
    logits(stock, tokens)
    for index in range(5):
        found = store.get(index, needs)
        count = 6 * (READ if index < DECODER else WRITTEN)
        assert {statistic.tokens for statistic in found.values()} == {count}
        for need in (Needs.HIDDEN_GRAM, Needs.MIXED_GRAM):
            x = seen[index, need].flatten(0, 1)
            torch.testing.assert_close(found[need].mean, x.t() @ x / count, rtol=1e-4, atol=1e-6)
        before, after = (t.flatten(0, 1) for t in blocks[index])
        torch.testing.assert_close(
            found[Needs.CHANGE].mean[:HIDDEN], (after - before).mean(0), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            found[between].mean, after.t() @ after / count, rtol=1e-4, atol=1e-4
        )


def test_gradients_are_those_of_the_stock_models_loss(plain):
    model, stock, tokens = opened(plain), stock_of(plain), rows(3)
    store = Store()
    calibrate(model, tokens, frozenset({LOSS["mlp"]}), store)
    stock.requires_grad_(True)
    stock(input_ids=tokens.ids, labels=tokens.labels).loss.backward()
    for index in (0, DECODER + 1):
        mlp = layer_of(stock, index).layer[-1].DenseReluDense
        one, other = (linear.weight * linear.weight.grad for linear in (mlp.wi, mlp.wo))
        products = torch.cat((one.t(), other))
        found = store.get(index, [LOSS["mlp"]])[LOSS["mlp"]].mean
        torch.testing.assert_close(found[1], products.sum(0), rtol=1e-4, atol=1e-9)


# What narrowing does


def mask(layer, kind, narrowing, size):
    """The same in the stock weights, without a change of shape."""
    attention, mlp = layer.layer[0].SelfAttention, layer.layer[-1].DenseReluDense
    if kind == "mlp":
        mlp.wo.weight[:, 7 * size :] = 0
    elif kind == "query_key":
        dropped = torch.ones(HEADS, D_KV, dtype=torch.bool).scatter(1, narrowing.keep, value=False)
        attention.q.weight[dropped.flatten()] = 0
    else:
        projection = torch.block_diag(*(narrowing.encode @ narrowing.encode.mT))
        attention.v.weight.copy_(projection @ attention.v.weight)


@pytest.mark.parametrize("size", [4, 0])
@pytest.mark.parametrize("kind", ["mlp", "query_key", "value_output"])
def test_masked_equals_sliced(folder, kind, size):
    """In the first block of each stack, whose position bias the others go on with, and behind.

    The mistakes: a first block that makes no bias when its values or its scores are gone.
    """
    model, stock, tokens = opened(folder), stock_of(folder), rows(2)
    dense = logits(stock, tokens)
    for index in (0, 1, DECODER, DECODER + 2):
        block = model.blocks[index]
        unit = next(unit for unit in block.units(1) if unit.kind == kind)
        narrowing = narrowings(block, size)[kind]
        if size == 0 and kind == "value_output":
            narrowing = replace(narrowing, encode=narrowing.encode[..., :0])
        narrow_unit(block, unit, narrowing)
        mask(layer_of(stock, index), kind, narrowing, size)
    assert same(model.module, stock, tokens)
    assert spread(logits(model.module, tokens), dense) > 1e-3


def test_scores_without_the_position_bias_are_others(plain):
    """So the tests above would see it missing."""
    model, tokens = opened(plain), rows(2)
    for kind in ("eager", "sdpa"):
        attend_by(model.module, kind)
        dense = logits(model.module, tokens)
        for start in (0, DECODER):
            table = model.blocks[start].attention.module.relative_attention_bias.weight
            kept = table.clone()
            table.zero_()
            assert spread(logits(model.module, tokens), dense) > 1e-2
            table.copy_(kept)


def finite_differences(model, tokens, block):
    """The form of the block's own attention, whose query weights are moved a little."""
    line = Stream(model, tokens)
    for before in model.blocks[: block.index]:
        line.advance(before)
    states, weight = line.at(slice(None)), block.attention.module.q_proj.weight
    original = weight.data.clone()

    def mixed(coefficients):
        scaled = rescaled(original.view(HEADS, D_KV, -1).mT, coefficients, 0)
        weight.data.copy_(scaled.mT.reshape(weight.shape))
        with watched(block, until=block.attention.module.o_proj) as seen:
            line.through(block, states)
        return seen.mixed

    moved = []
    for direction in 1e-3 * torch.eye(D_KV).double():
        one = torch.ones(D_KV).double()
        moved.append((mixed(one + direction) - mixed(one - direction)) / 2e-3)
    weight.data.copy_(original)
    changed = (
        torch.stack(moved).unflatten(-1, (HEADS, -1)).transpose(2, 3) @ block.attention.output_rows
    )
    return form_of(changed, tokens.mask[:, line.part(block)], HEADS)


def test_pairs_are_weighed_by_the_models_own_attention(plain, monkeypatch):
    """By brute force, where the bias is made and where it is handed on. The mistake: softmax
    weights of the scores alone."""
    model, tokens, store = opened(plain), rows(3), Store()
    needs = frozenset({Needs.PAIR_SCORES})
    calibrate(model, tokens, needs, store)
    blind, whole = Store(), Attention._scores
    monkeypatch.setattr(Attention, "_scores", lambda *args: whole(*args)[:5])
    calibrate(model, tokens, needs, blind)
    monkeypatch.undo()
    for index in (0, 1, DECODER, DECODER + 1):
        with torch.no_grad():
            expected = finite_differences(model, tokens, model.blocks[index])
        found, wrong = (s.get(index, needs)[Needs.PAIR_SCORES].mean for s in (store, blind))
        assert spread(found, expected) < 1e-3
        assert spread(wrong, expected) > 1e-2
