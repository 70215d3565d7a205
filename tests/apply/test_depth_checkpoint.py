"""Checkpoints and plans that lack whole blocks."""

import json
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from secateur import Budget, InputError, MoDeGPT, Settings, make_plan, open_model
from secateur.allocate.least_error import LeastError
from secateur.apply.save import finish, store_block, writer_for
from secateur.apply.sequential import narrow_blocks
from secateur.calibration.layer_stream import Stream
from secateur.data.tokens import Calibration
from secateur.methods.replace import Replace
from secateur.methods.shortgpt import ShortGPT
from secateur.pipeline import compress_stage
from secateur.pipeline.context import RunContext
from secateur.pipeline.prepare import check_reach
from secateur.planning.checks import match_units
from secateur.planning.planner import revise, tier_of
from secateur.scoring.evidence import score
from secateur.structure.units import DEPTH, WIDTHS
from tests.contract.conftest import logits, spread
from tests.support import families
from tests.support.blocks import IDS, bypassed, every_family, given_to, gone, measure, padded
from tests.support.families import CAUSAL, FAMILIES
from tests.support.steps import prepared_of, step_of


def write(model, method, sizes, folder, tokens=None):
    """A checkpoint of these sizes, as the pipeline writes one."""
    tokens, store = measure(model, method, tokens)
    evidence = score(model, method, store, tokens, LeastError())
    record = Calibration("stream", 6, 32, 0)
    given = {"budget": Budget(keep=1.0), "allocator": LeastError(), "store": store}
    plan = make_plan(model, method, evidence, record, tokens, **given)
    rows = tuple(row.model_copy(update={"after": sizes[row.unit]}) for row in plan.units)
    plan = revise(plan.model_copy(update={"units": rows}), model, method, evidence)
    prepared = prepared_of(model, SimpleNamespace(tokens=tokens, store=store), plan, method)
    memory, ids = compress_stage.write(prepared, folder, RunContext())
    return plan, memory, ids


# Checkpoints


def saved(folder):
    return json.loads((folder / "config.json").read_text())


def generated(model, cached):
    with torch.inference_mode():
        return model.generate(
            IDS,
            attention_mask=torch.ones_like(IDS),
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            use_cache=cached,
            pad_token_id=0,
        )


@every_family
def test_stock_classes_load_what_is_left(opened, tmp_path, name):
    """The mistakes: KV caches by the old numbers, kinds of layers by the old places."""
    model, (asked, tokens) = opened(name), given_to(name)
    expected, stored = bypassed(model, {0: 0.0}, asked), model.stored
    plan, *_ = write(model, ShortGPT(), gone(model, 0), tmp_path / "small", tokens)
    assert plan.tier == "plain"
    assert not (tmp_path / "small" / "modeling_secateur.py").exists()
    config, dense = saved(tmp_path / "small"), FAMILIES[name].options
    assert config.get("num_hidden_layers", config.get("n_layer")) == 2
    if "layer_types" in dense:
        assert config["layer_types"] == dense["layer_types"][1:]
    small = FAMILIES[name].auto.from_pretrained(tmp_path / "small", dtype=stored).eval()
    assert type(small).__module__.startswith("transformers.models.")
    if "gemma2" in name:
        small.set_attn_implementation("eager")
    assert spread(logits(small, asked), expected) < 2e-5
    assert name not in CAUSAL or torch.equal(generated(small, True), generated(small, False))
    again = open_model(tmp_path / "small", Settings(device="cpu"))
    assert [block.index for block in again.blocks] == [0, 1]


def last(model):
    """Logits of the last token, with the others in a cache and without one."""
    with torch.inference_mode():
        cache = model(input_ids=IDS[:, :-1], use_cache=True).past_key_values
        step = model(input_ids=IDS[:, -1:], past_key_values=cache).logits[0, -1]
        return step, logits(model, IDS)[0, -1]


def test_the_model_in_memory_follows(opened, tmp_path):
    """And the mistake put back: by old numbers a cache has a layer too few."""
    model = opened("llama")
    expected = bypassed(model, {0: 0.0})
    write(model, ShortGPT(), gone(model, 0), tmp_path / "small")
    assert [block.index for block in model.blocks] == [0, 1]
    assert model.config.num_hidden_layers == 2
    numbered = [m for m in model.module.modules() if hasattr(m, "layer_idx")]
    assert [module.layer_idx for module in numbered] == [0, 1]
    model.module.float()
    assert spread(logits(model.module, IDS), expected) < 0.2  # left in bfloat16
    assert spread(*last(model.module)) < 1e-5
    for module in numbered:
        module.layer_idx += 1
    with pytest.raises(IndexError):
        last(model.module)


def test_bytes_on_disk_are_those_of_the_blocks_left(dense, opened, tmp_path):
    before = load_file(dense("llama") / "model.safetensors")
    model = opened("llama")
    plan, *_ = write(model, Replace(), gone(model, 1), tmp_path / "small")
    after = load_file(tmp_path / "small" / "model.safetensors")
    assert plan.tier == "per-layer"
    new = set(after) - set(before)
    assert new == {"model.layers.0.mlp.down_proj.bias"}
    lost = sum(t.nbytes for key, t in before.items() if ".layers.1." in key)
    sizes = [sum(t.nbytes for t in tensors.values()) for tensors in (before, after)]
    assert sizes[0] - sizes[1] == lost - 4 * families.HIDDEN
    for key, tensor in after.items():
        if key not in new:
            old = key.replace(".layers.1.", ".layers.2.")
            assert torch.equal(tensor, before[old]), key
    units = {unit.name: unit for unit in Replace().units(opened("llama"), 8)}
    counted_as = units["layers.1.block"].cost(1, 4).bytes
    assert 0 < lost - counted_as < 0.05 * lost  # norms, which no unit counts
    assert lost - counted_as > 4 * families.HIDDEN  # and which outweigh the new bias


def test_per_layer_checkpoints_may_lack_blocks_too(opened, tmp_path):
    """A block gone, another with a bias of its own, a third narrower."""

    @dataclass(frozen=True)
    class Both(MoDeGPT):
        kinds: ClassVar = (*WIDTHS, *DEPTH)
        needs: ClassVar = MoDeGPT.needs | Replace.needs
        biased: ClassVar = True

        def solve(self, unit, block, statistics):
            if unit.kind == "block":
                return Replace().solve(unit, block, statistics)
            return super().solve(unit, block, statistics)

    model, method = opened("llama"), Both()
    tokens, store = measure(model, method)
    units = method.units(model, 8)
    sizes = {unit.name: unit.size for unit in units} | {
        "layers.1.block": 0,
        "layers.2.mlp": 24,
        "layers.2.value_output": 3,
    }
    assert tier_of(units, sizes) == "per-layer"
    writer = writer_for(model, "per-layer", tmp_path)
    for block in narrow_blocks(model, method, units, sizes, tokens, store):
        store_block(model, block, writer)
    expected = logits(model.module, IDS)
    finish(model, "per-layer", writer)
    layers = saved(tmp_path)["secateur"]["layers"]
    assert [sorted(layer) for layer in layers] == [["linears"], ["attention", "linears"]]
    assert list(layers[0]["linears"]) == ["mlp.down_proj"]
    small = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert spread(logits(small, IDS), expected) < 2e-5
    assert torch.equal(generated(small, True), generated(small, False))


# Plans and tiers


def test_plans_keep_a_block_and_tiers_follow_from_biases(opened):
    for name, method, tier in (
        ("llama", ShortGPT(), "plain"),
        ("llama", Replace(), "per-layer"),
        ("llama", Replace(compensate=0), "plain"),
        ("gpt2", Replace(), "plain"),  # its MLPs have biases
    ):
        model = opened(name)
        units = method.units(model, 8)
        assert tier_of(units, gone(model, 1)) == tier
        assert tier_of(units, gone(model)) == "plain"
    made = ShortGPT()
    step = step_of(made, 0.7, tier="plain")
    assert isinstance(step.allocator, LeastError)
    check_reach(opened("llama"), step)
    with pytest.raises(InputError, match="--compensate 0"):
        check_reach(opened("llama"), step_of(Replace(), 0.7, step.allocator, tier="plain"))
    model = opened("llama")
    tokens, store = measure(model, made)
    evidence = score(model, made, store, tokens)
    plan = make_plan(model, made, evidence, Calibration("s", 6, 32, 0), tokens)
    rows = tuple(row.model_copy(update={"after": 0}) for row in plan.units)
    with pytest.raises(InputError, match="no block is left"):
        match_units(plan.model_copy(update={"units": rows}), model, made)


def test_a_bypass_outlives_a_look_at_the_head(opened):
    """The mistake: taking the logits of a stream puts a block back that is gone."""
    model, tokens = opened("llama"), padded()
    walking = Stream(model, tokens)
    model.blocks[1].remove()
    before = logits(model.module, IDS)
    walking.logits(walking.batches[0], walking.at(walking.batches[0]))
    assert torch.equal(logits(model.module, IDS), before)
    model.blocks[1].put_back()
    assert spread(logits(model.module, IDS), before) > 1e-3
