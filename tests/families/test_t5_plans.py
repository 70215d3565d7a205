"""T5 from a plan to a checkpoint: targets, times, what stays, and what is written."""

from functools import partial

import pytest
import torch
import transformers

from secateur import Settings, Store, calibrate
from secateur.allocate.base import places
from secateur.allocate.uniform import Uniform
from secateur.apply.save import finish, store_block, writer_for
from secateur.apply.sequential import Propagation
from secateur.apply.surgery import narrow_block, narrow_unit
from secateur.evaluate import verify
from secateur.methods.auto import Auto
from secateur.methods.modegpt import MoDeGPT
from secateur.methods.shortgpt import ShortGPT
from secateur.methods.slicegpt import SliceGPT
from secateur.models.loading import skeleton
from secateur.models.model import anatomy_of, not_served
from secateur.scoring.latency import measured
from secateur.structure.budget import Budget
from secateur.structure.narrowing import Narrowing
from tests.contract.conftest import logits
from tests.support import t5
from tests.support.families import WIDTH
from tests.support.t5 import (
    D_KV,
    DECODER,
    WRITTEN,
    config,
    narrowings,
    opened,
    rows,
    same,
    stock_of,
    written,
)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "gated"])
def folder(request, tmp_path_factory):
    return t5.made(request.param, tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return t5.made(False, tmp_path_factory.mktemp("plain"))


# What is seen of it


def test_a_model_without_weights_has_as_many(folder, tmp_path):
    """The mistake: the head of the gated one, whose config always says tied, counted as shared."""
    model = opened(folder)
    for stack in model.blocks[0], model.blocks[3]:
        (unit,) = (u for u in stack.units(1) if u.kind == "mlp")
        narrow_unit(stack, unit, narrowings(stack, 4)["mlp"])
    save(model, tmp_path / "small", "per-layer")
    for source in folder, tmp_path / "small":
        shapes, whole = skeleton(str(source), Settings()), opened(source)
        counts = [sum(p.numel() for p in m.module.parameters()) for m in (shapes, whole)]
        assert counts[0] == counts[1]


def test_units_know_the_ends_of_their_stacks(plain):
    found = places(opened(plain).units(4))
    assert found == {0: (0, 2), 1: (1, 2), 2: (0, 3), 3: (1, 3), 4: (2, 3)}


# Propagation


def narrow_sizes(model, share):
    return {
        unit.name: max(s for s in unit.sizes() if s <= share * unit.size) for unit in model.units(4)
    }


def test_targets_bring_the_narrowed_stream_back_to_the_dense_one(folder, monkeypatch):
    """A block of the decoder adds what it reads of the encoder between attention and MLP.

    The mistakes: to take it for no plain sum, or to leave it in the MLP's target.
    """
    monkeypatch.setattr("secateur.calibration.layer_stream.BATCHES", 1)
    model, tokens, method = opened(folder), rows(6), Auto(iterations=0)
    store = Store()
    calibrate(model, tokens, method.needs, store)
    line, sizes = Propagation(model, tokens, method), narrow_sizes(model, 0.6)
    for block in model.blocks:
        units = [unit for unit in model.units(4) if unit.block == block.index]
        before, part = line.narrow.states.clone(), line.narrow.part(block)
        line.narrow_block(block, units, sizes, store.get(block.index, method.needs))
        entering = []
        note = partial(lambda into, _, args: into.append(args[0]), entering)
        handle = block.module.layer[-1].register_forward_pre_hook(note)
        with torch.no_grad():
            line.narrow.through(block, before)
        handle.remove()
        expected = line.dense.states[:, part] - entering[0]  # both behind the block
        torch.testing.assert_close(line.targets[:][:, part], expected, rtol=1e-6, atol=1e-6)


def test_propagation_lowers_the_error(folder):
    tokens, errors = rows(60), {}
    for name, method in (("auto", Auto()), ("modegpt", MoDeGPT())):
        model, store = opened(folder), Store()
        dense = logits(model.module, tokens)
        calibrate(model, tokens, method.needs, store)
        sizes = narrow_sizes(model, 0.6)
        line = Propagation(model, tokens, method) if name == "auto" else None
        for block in model.blocks:
            units = [unit for unit in model.units(4) if unit.block == block.index]
            statistics = store.get(block.index, method.needs)
            if line is None:
                narrow_block(block, units, sizes, method, statistics)
            else:
                line.narrow_block(block, units, sizes, statistics)
        errors[name] = float((logits(model.module, tokens) - dense).square().mean() / dense.var())
    assert errors["auto"] < 0.8 * errors["modegpt"]


# What is written


def save(model, folder, tier):
    writer = writer_for(model, tier, folder)
    for block in model.blocks:
        store_block(model, block, writer)
    finish(model, tier, writer)
    return transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, output_loading_info=True)


def test_a_checkpoint_has_its_own_shapes_in_both_stacks(folder, tmp_path):
    model, tokens = opened(folder), rows(1)
    for index, kind, size in ((0, "value_output", 2), (1, "mlp", 4), (3, "query_key", 4)):
        block = model.blocks[index]
        unit = next(unit for unit in block.units(1) if unit.kind == kind)
        narrow_unit(block, unit, narrowings(block, size)[kind])
    loaded, info = save(model, tmp_path / "small", "per-layer")
    assert type(loaded).__name__ == "SecateurT5ForConditionalGeneration"
    assert info["missing_keys"] == info["unexpected_keys"] == set()
    assert same(loaded.double().eval(), model.module, tokens)
    names = loaded.state_dict().keys()
    assert "decoder.block.0.layer.0.SelfAttention.q.weight" in names  # as it was
    assert "decoder.block.1.layer.0.SelfAttention.q_proj.weight" in names
    tables = [name for name in names if "relative_attention_bias" in name]
    assert len(tables) == 2
    body = transformers.AutoModel.from_pretrained(tmp_path / "small")
    assert type(body).__name__ == "SecateurT5Model"


def test_one_width_for_both_stacks_needs_no_code(folder, tmp_path):
    model, tokens = opened(folder), rows(1)
    for block in model.blocks:
        narrow_unit(block, block.units(8)[0], Narrowing(keep=torch.arange(40)))
    loaded, _ = save(model, tmp_path / "small", "plain")
    assert type(loaded) is transformers.T5ForConditionalGeneration
    assert loaded.config.d_ff == 40
    assert same(loaded.double().eval(), model.module, tokens)


def test_the_next_token_is_that_of_a_whole_pass(folder):
    """Speed is measured step by step, with what the encoder has given once."""
    model, tokens = opened(folder), rows(1)
    use, module = model.use, model.module
    inputs = use.inputs(tokens) | {"use_cache": True}
    inputs["decoder_input_ids"] = inputs["decoder_input_ids"][:, :1]
    with torch.no_grad():
        state = module(**inputs)
        found = [state.logits[:, -1:].argmax(-1)]
        for _ in range(6):
            found.append(module(**use.going_on(found[-1], state)).logits[:, -1:].argmax(-1))
    assert torch.equal(torch.cat(found, 1), written(module, tokens, False))
    assert verify.reference_outputs(model, tokens)["greedy.cached"].shape == (16,)


# What stays


def test_what_stays_whole_is_said(plain):
    model = opened(plain)
    assert any("whole heads" in reason for reason in model.obstacles_of(("heads",)))
    assert any("attention to the encoder" in r for r in model.obstacles_of(("value_output",)))
    assert all(unit.fixed for unit in model.units(8, ("heads", "block")))
    assert "position bias" in ShortGPT().obstacle(model)
    assert "residual stream" in SliceGPT().obstacle(model)


def test_only_a_decoder_has_a_cache_to_shrink(plain):
    for unit in opened(plain).units(8, ("query_key", "value_output", "heads")):
        bytes_of = {unit.cost(size, 4).cache_bytes_per_token for size in unit.sizes()}
        assert (bytes_of == {0}) == (unit.block < DECODER)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [({"is_encoder_decoder": False}, "both together"), ({"decoder_start_token_id": None}, "start")],
)
@pytest.mark.parametrize("gated", [False, True])
def test_half_a_model_is_refused(gated, changed, reason):
    assert anatomy_of(config(gated)) is not None
    assert anatomy_of(config(gated, **changed)) is None
    assert reason in not_served(config(gated, **changed))


def test_units_of_either_stack_have_their_own_times(plain, monkeypatch, tmp_path):
    """The mistake: a block of the encoder stands for those of the decoder, or the other way."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = opened(plain)

    def timed(run, device):
        run()
        sizes = [model.blocks[i].mlp.consumer_weight.shape[0] for i in (0, DECODER)]
        values = [model.blocks[i].attention.module.value for i in (0, DECODER)]
        whole = 10**6 + 40 * sizes[0] + 70 * sizes[1] + 9 * values[0] + 11 * values[1]
        return 1e-9 * whole

    monkeypatch.setattr("secateur.scoring.latency._timed", timed)
    units = model.units(8)
    prices = measured(model, units, Budget(target="latency", length=20))
    for unit in units:
        if unit.kind == "mlp":
            rate = 40 if unit.block < DECODER else 70
            assert prices.of(unit, WIDTH) == pytest.approx(rate * WIDTH, abs=2)
            assert prices.of(unit, 24) == pytest.approx(rate * 24, abs=2)
        elif unit.kind == "value_output":
            rate = 9 if unit.block < DECODER else 11
            assert prices.of(unit, D_KV) == pytest.approx(rate * D_KV, abs=2)
    keep = 0.9995
    assert Uniform().allocate(units, None, prices, keep)  # a budget of time can be spent


def test_targets_are_answers_and_the_decoder_starts_one_before(folder):
    model, tokens = opened(folder), rows(2)
    with torch.no_grad():
        stock = stock_of(folder)(input_ids=tokens.ids, labels=tokens.labels)
    total, count = model.use.loss(logits(model.module, tokens), tokens)
    assert count == 2 * WRITTEN
    torch.testing.assert_close(total / count, stock.loss, rtol=1e-5, atol=1e-5)
    short = model.use.beginning(tokens, 5)
    assert short.ids.shape == short.labels.shape == (1, 5)
    assert short.mask.shape == (1, 10)
    example = model.use.example(3, 40)
    assert example.mask.shape == (3, 40 + 2 * 2 + 3)
