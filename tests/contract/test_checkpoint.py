"""What is on disk, and what fresh processes make of it, with the package and without."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from secateur.apply import save as checkpoint
from secateur.io.safetensors_writer import Writer
from secateur.pipeline.compress_stage import write
from secateur.pipeline.context import RunContext
from secateur.structure.units import DEPTH
from tests.contract.conftest import ROUNDING, ROUTES, logits, narrowing, open_config, spread
from tests.support.families import (
    AUTO,
    FAMILIES,
    HIDDEN,
    WRITING,
    attentions,
    caches,
    seen_by,
    window,
)
from tests.support.steps import prepared_of

every_family = pytest.mark.parametrize("name", FAMILIES)
every_writer = pytest.mark.parametrize("name", WRITING)
every_route = pytest.mark.parametrize(("route", "kind"), ROUTES)


@every_family
@every_route
def test_reloaded_logits_are_those_in_memory(readings, written, name, route, kind):
    memory, read = written(name, kind).memory, readings(route)(name, kind)
    assert read.facts["missing"] == read.facts["unexpected"] == []
    for attention in attentions(name):
        found, expected = read.tensors[f"logits.{attention}"], memory[f"logits.float32.{attention}"]
        assert spread(found, expected) < ROUNDING
    rounded = memory[f"logits.bfloat16.{attentions(name)[-1]}"]
    assert spread(read.tensors["logits.bfloat16"], rounded) < 0.15
    assert spread(read.tensors["logits.eager"], read.tensors["logits.sdpa"]) < ROUNDING


@every_writer
@every_route
def test_cached_generation_equals_uncached(readings, name, route, kind):
    said = readings(route)(name, kind).tensors
    for attention in attentions(name):
        cached, uncached = (said[f"{how}.{attention}"] for how in ("cached", "uncached"))
        assert torch.equal(cached, uncached)
    assert torch.equal(said["cached.eager"], said["cached.sdpa"])


@every_writer
@every_route
def test_left_padding_changes_no_token(readings, name, route, kind):
    said = readings(route)(name, kind).tensors
    for attention in attentions(name):
        assert torch.equal(said[f"padded.{attention}"], said["alone"])


@every_family
@every_route
def test_base_model_loads_with_the_same_states(readings, name, route, kind):
    said = readings(route)(name, kind).tensors
    assert spread(said["states"], said["states.expected"]) < 5e-5


@every_family
@every_route
def test_a_loaded_checkpoint_saves_and_loads_again(readings, name, route, kind):
    said = readings(route)(name, kind).tensors
    assert spread(said["logits.again"], said["logits.eager"]) < ROUNDING


def blocks_gone(plan):
    return [i for i in range(3) if plan.sizes.get(f"layers.{i}.block") == 0]


@every_family
@every_route
def test_attention_maps_are_given_out(readings, written, name, route, kind):
    said, rows = readings(route)(name, kind).tensors, written(name, kind).plan.units
    gone, tokens = blocks_gone(written(name, kind).plan), written(name, kind).tokens
    for place, i in enumerate(i for i in range(3) if i not in gone):
        own = {row.kind: row for row in rows if row.unit.startswith(f"layers.{i}.")}
        values = own.get("heads", own.get("value_output"))
        heads, paid = 4, 1.0
        if values is not None and values.after == 0:
            paid = 0.0  # that block has no attention left
        elif "heads" in own:
            heads = 4 * values.after // values.before
        maps, length = said[f"attentions.{place}"], seen_by(name, i, tokens)
        assert maps.shape == (heads, length, length)
        torch.testing.assert_close(maps.sum(-1), torch.full((heads, length), paid))
        assert bool((maps.triu(1) == 0).all()) == (caches(name, i) or paid * heads == 0)


@every_family
@every_route
def test_a_loaded_checkpoint_trains(readings, name, route, kind):
    without = readings(route)(name, kind).facts["without_gradient"]
    if kind == "gone":  # a norm whose only reader is gone
        without = [key for key in without if "norm" not in key and ".ln_" not in key]
    assert without == []


@every_family
@every_route
def test_stock_classes_are_given_where_the_tier_is_plain(
    readings, written, method, name, route, kind
):
    facts, tier = readings(route)(name, kind).facts, written(name, kind).plan.tier
    if kind == "plain":
        assert tier == "plain"
    elif not (method.kinds == DEPTH and tier == "plain"):
        assert tier == "per-layer"
    # where no bias is new, blocks that are left are stock ones
    assert facts["class"].startswith("Secateur") == (tier != "plain")
    if tier != "plain":
        package = "secateur.layers.modeling_secateur"
        inside = facts["module"].startswith("transformers_modules.")
        assert inside if route == "stranger" else facts["module"] == package


def stored(made):
    return load_file(made.folder / "model.safetensors")


@every_family
@pytest.mark.parametrize("kind", ["plain", "layered", "mixed", "gone"])
def test_bytes_on_disk_are_those_of_the_plan(dense, opened, written, method, name, kind):
    """Fails for zero-filled tensors of full size, for stale biases and for uncounted indices."""
    made = written(name, kind)
    before = load_file(dense(name) / "model.safetensors")
    price = {u.name: u.cost(u.size, 4).bytes for u in method().units(opened(name), 8)}
    saved = sum(price[row.unit] - row.bytes for row in made.plan.units)
    sizes = [sum(t.nbytes for t in tensors.values()) for tensors in (before, stored(made))]
    if method.kinds == DEPTH:  # norms and biases go uncounted
        blocks, gone = FAMILIES[name].blocks, blocks_gone(made.plan)
        held = opened(name).module.state_dict()
        own = [key for key in held if any(f".{blocks}.{i}." in f".{key}" for i in gone)]
        taken, new = sum(held[key].nbytes for key in own), len(stored(made)) - len(before)
        assert sizes[0] - sizes[1] == taken - 4 * HIDDEN * (new + len(own))
        assert 0.9 * taken < saved <= taken
        return
    assert sizes[0] - sizes[1] == saved
    assert (saved > 0) == any(row.after < row.before for row in made.plan.units)
    assert saved > 0 or (kind == "plain" and "mlp" not in method.kinds)


@narrowing("mlp")
@every_family
def test_weights_on_disk_are_narrow_and_changed(opened, written, method, name):
    """Fails where edited weights never reach the file, or are zeroed instead of cut."""
    made, family = written(name, "layered"), FAMILIES[name]
    before, after = opened(name).module.state_dict(), stored(made)
    paths = [f".{family.consumer_path(i)}.weight" for i in range(3)]
    consumers = [key for path in paths for key in after if f".{key}".endswith(path)]
    widths = {row.unit: row.after for row in made.plan.units}
    dense_width = next(row.before for row in made.plan.units if row.kind == "mlp")
    assert len(consumers) == 3
    assert min(widths[f"layers.{i}.mlp"] for i in range(3)) < dense_width
    for i, key in enumerate(consumers):
        width = widths[f"layers.{i}.mlp"]
        assert sorted(after[key].shape) == sorted((width, HIDDEN))
        assert (width < dense_width) == (after[key].shape != before[key].shape)
    for key, tensor in after.items():
        if tensor.dim() == 2 and tensor.numel() and ".rope_pairs" not in key and "embed" not in key:
            zeros = [int((tensor == 0).all(dim).sum()) for dim in (0, 1)]
            if not (key in consumers and name.startswith(("opt", "t5"))):  # ReLUs may be dead
                assert zeros == [0, 0], key
    attention = opened(name).blocks[0].attention.module
    heads = {
        "q_proj": attention.heads,
        "k_proj": attention.kv_heads,
        "v_proj": attention.kv_heads,
    }
    each = {"query_key": 1, "value_output": 1, "heads": attention.kv_heads / attention.value}
    narrowed = {
        "query_key": ("q_proj", "k_proj"),
        "value_output": ("v_proj",),
        "heads": ("q_proj", "k_proj", "v_proj"),
    }
    units = {unit.name: unit for unit in method().units(opened(name), 8)}
    for row in made.plan.units:
        for projection in narrowed.get(row.kind, ()):
            path = f".{family.path(units[row.unit].block)}."
            own = [k for k in after if path in f".{k}"]
            found = [k for k in own if k.endswith(f".{projection}.weight")]
            for key in found:  # where the attention did not change, maps may be fused
                assert after[key].shape[0] / heads[projection] * each[row.kind] == row.after


@every_writer
@pytest.mark.parametrize("kind", ["layered", "mixed", "gone"])
def test_cache_is_as_narrow_as_the_plan_says(opened, readings, written, method, name, kind):
    made = written(name, kind)
    units = {u.name: u for u in method().units(opened(name), 8)}
    facts, full = (readings("stranger")(name, k).facts for k in (kind, "full"))
    if name == "falcon":
        pytest.skip("its stock attention caches a key for every query head, and plans do not")
    saved = 0
    for row in made.plan.units:
        unit = units[row.unit]
        before, back = unit.cost(row.before, 4).cache_bytes_per_token, window(name, unit.block)
        tokens = seen_by(name, unit.block, made.tokens)
        held = tokens if back is None else min(tokens, back - 1)  # a window keeps its own length
        saved += (before - row.cache_bytes_per_token) * held
    assert (full["cache"] - facts["cache"]) * 4 == saved


@pytest.mark.parametrize("name", FAMILIES)
def test_config_says_where_the_classes_are(written, name):
    made = written(name, "layered")
    config = json.loads((made.folder / "config.json").read_text())
    layers = 3 - len(blocks_gone(made.plan))
    counts = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers")
    assert sum(config.get(key, 0) for key in counts) == layers
    if made.plan.tier == "plain":
        assert config["model_type"] == open_config(name).model_type
        assert {"secateur", "auto_map"}.isdisjoint(config)
        return
    family = FAMILIES[name]
    stock = family.config.removesuffix("Config").removesuffix("Text")
    head = AUTO[family.use].removeprefix("AutoModel") if stock != "GPT2" else "LMHeadModel"
    head = head if stock != "T5" else "ForConditionalGeneration"
    assert config["model_type"].startswith("secateur_")
    assert config["architectures"] == [f"Secateur{stock}{head}"]
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", AUTO[family.use]}
    stacks = [config["secateur"], config["secateur"].get("decoder", {})]
    assert sum(len(stack.get("layers", ())) for stack in stacks) == layers


@every_family
def test_same_seed_gives_the_same_bytes(tmp_path, method, write_to, written, name):
    first = written(name, "layered").folder
    second = write_to(tmp_path / "again", method, name, "layered").folder
    files = sorted(p.relative_to(first) for p in first.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(second) for p in second.rglob("*") if p.is_file())
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes(), file


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "opt", "bert"])
def test_shards_load_equally(tmp_path, monkeypatch, method, write_to, written, name):
    whole = stored(written(name, "layered"))
    monkeypatch.setattr(checkpoint, "Writer", partial(Writer, shard_bytes=9000))
    made = write_to(tmp_path / "sharded", method, name, "layered")
    shards = sorted(made.folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert not list(made.folder.glob("shard-*"))
    index = json.loads((made.folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(whole)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    opener = FAMILIES[name].auto
    model = opener.from_pretrained(made.folder, dtype=torch.float32).eval()
    found = logits(model, made.tokens)[0]
    assert spread(found, made.memory["logits.float32.sdpa"]) < ROUNDING


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gpt_neox", "vit"])
def test_bfloat16_checkpoints_are_written_in_bfloat16(
    tmp_path, opened, calibrated, planned, method, name
):
    model, data = opened(name), calibrated(name)
    model.stored = torch.bfloat16
    plan = planned(model, name, method(), keep=0.7)
    prepared = prepared_of(model, data, plan)
    memory, first = write(prepared, tmp_path / "half", RunContext())
    tensors = load_file(tmp_path / "half" / "model.safetensors")
    assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.bfloat16}
    loaded = FAMILIES[name].auto.from_pretrained(tmp_path / "half", dtype=torch.float32).eval()
    expected = memory["logits.float32.sdpa"]  # of weights rounded like those on disk
    assert spread(logits(loaded, first)[0], expected) < ROUNDING
