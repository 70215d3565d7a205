"""Compressed checkpoints as classes of transformers itself, and what can't be such."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from secateur import InputError, Settings, open_model
from secateur.evaluate import evaluator
from secateur.export.checkpoint import export_plain
from secateur.export.stock_classes import conform
from secateur.utils.errors import RunError
from secateur.utils.progress import Progress
from tests.contract.conftest import logits, spread
from tests.support.families import FAMILIES, read
from tests.support.shaped import shaped

IDS = read("llama", 1, 40, seed=5).ids
SHARED = [[3, 0, 2], [2, 3, 0]]  # the same three pairs in both KV heads, in another order


@pytest.fixture(autouse=True)
def near(monkeypatch):
    """The fresh process is a call, which saves seconds; one test has a real one."""

    def call(command, **_):
        return SimpleNamespace(returncode=evaluator.main(*map(Path, command[-2:])))

    monkeypatch.setattr(
        evaluator, "subprocess", SimpleNamespace(DEVNULL=subprocess.DEVNULL, run=call)
    )


@pytest.fixture
def exported(opened, tmp_path):
    """A variant of these sizes, as it was and as a stock class."""

    def make(name, sizes, pairs=None):
        source = shaped(opened(name), tmp_path / "source", sizes, pairs)
        made = export_plain(source, tmp_path / "out", Settings(device="cpu"))
        opener = FAMILIES[name].auto
        before, after = (opener.from_pretrained(f).eval() for f in (source, tmp_path / "out"))
        return made, before, after

    return make


def same(before, after):
    """Whether two models, of different classes, say the same."""
    assert not type(after).__name__.startswith("Secateur")
    assert type(before).__name__.startswith("Secateur")
    return spread(logits(after, IDS), logits(before, IDS)) < 1e-4


CASES = {
    "one MLP width": ("llama", {"mlp": 40}, None, "llama"),
    "one head width": ("llama", {"query_key": 6, "value_output": 6}, SHARED, "llama"),
    "scaled rope": ("llama_scaled_rope", {"query_key": 6, "value_output": 6}, SHARED, "llama"),
    "yarn": ("llama_yarn", {"query_key": 6, "value_output": 6}, SHARED, "llama"),
    "unequal": ("llama", {"query_key": 6, "value_output": 3, "mlp": 40}, SHARED, "mimo_v2_flash"),
    "values alone": ("llama", {"value_output": 3}, None, "mimo_v2_flash"),
    "fewer heads": ("llama", {"heads": 1}, None, "llama"),
    "windows": ("mistral", {"query_key": 6, "value_output": 6}, SHARED, "mistral"),
    "new bias": ("qwen2", {"query_key": 6, "value_output": 6}, SHARED, "llama"),
    "norms in heads": ("qwen3", {"mlp": 40, "heads": 1}, None, "qwen3"),
    "own head_dim": ("gemma", {"query_key": 6, "value_output": 6}, SHARED, "gemma"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_stock_class_says_the_same(exported, case):
    name, sizes, pairs, model_type = CASES[case]
    made, before, after = exported(name, sizes, pairs)
    assert made.model_type == after.config.model_type == model_type
    assert same(before, after)


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox"])
def test_fused_and_other_families_keep_their_class_with_one_width(exported, name):
    made, before, after = exported(name, {"mlp": 40})
    assert same(before, after)
    assert made.notes == ()


def test_a_subset_of_pairs_is_a_longrope_of_the_wanted_frequencies(exported):
    made, before, after = exported("llama", {"query_key": 6, "value_output": 6}, SHARED)
    wanted = before.model.rotary_emb.inv_freq[[0, 2, 3]]
    torch.testing.assert_close(after.model.rotary_emb.inv_freq, wanted, rtol=1e-6, atol=0)
    rope = after.config.rope_parameters
    assert (rope["rope_type"], rope["attention_factor"]) == ("longrope", 1.0)
    assert rope["long_factor"] == rope["short_factor"]
    assert after.config.head_dim == 6
    assert "3 rotary pairs" in made.notes[0]


@pytest.mark.parametrize(
    ("sizes", "formats"),
    [
        ({"mlp": 40}, ["float32.eager", "float32.sdpa", "bfloat16.eager", "bfloat16.sdpa"]),
        ({"value_output": 3}, ["float32.eager"]),
    ],
)
def test_what_was_compared_is_said(opened, tmp_path, sizes, formats):
    source, lines = shaped(opened("llama"), tmp_path / "source", sizes), []
    progress = Progress()
    progress.say = lines.append
    made = export_plain(source, tmp_path / "out", Settings(device="cpu"), progress=progress)
    greedy = ["greedy.cached", "greedy.uncached"]
    assert list(made.compared) == [*greedy, *(f"logits.{name}" for name in formats)]
    assert any(all(name in line for name in made.compared) for line in lines)
    left_out = [line for line in lines if "not in bfloat16" in line]
    assert len(left_out) == (len(formats) == 1)


def test_scores_keep_the_scale_of_the_dense_heads(exported):
    """8 dims a head become 6: what reads 1/√6 gets queries times √(6/8)."""
    _, before, after = exported("llama", {"query_key": 6, "value_output": 6}, SHARED)
    old, new = (m.model.layers[0].self_attn for m in (before, after))
    assert new.scaling == pytest.approx(6**-0.5)
    assert old.scaling == pytest.approx(8**-0.5)
    ratio = new.q_proj.weight.detach().norm() / old.q_proj.weight.detach().norm()
    assert float(ratio) == pytest.approx((6 / 8) ** 0.5, rel=1e-5)
    keys = new.k_proj.weight.detach().norm() / old.k_proj.weight.detach().norm()
    assert float(keys) == pytest.approx(1, rel=1e-5)


def test_half_precision_is_compared_with_what_the_file_holds(opened, tmp_path):
    model = opened("llama")
    model.stored = torch.bfloat16
    source = shaped(model, tmp_path / "source", {"query_key": 6, "value_output": 6}, SHARED)
    export_plain(source, tmp_path / "out", Settings(device="cpu"))
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert after.dtype == torch.bfloat16
    before = AutoModelForCausalLM.from_pretrained(source)
    assert spread(logits(after.float(), IDS), logits(before.float(), IDS)) < 0.1


def test_other_forms_are_multiplied_out(opened, tmp_path):
    from secateur.layers.factored_secateur import LowRank
    from secateur.models.linear_ops import dense_weight

    model = opened("llama")
    for block in model.blocks:
        spec = {"form": "low_rank", "outputs": 32, "inputs": 56, "bias": False, "rank": 8}
        block.module.set_submodule("mlp.down_proj", made := LowRank(spec))
        for parameter in made.parameters():
            parameter.data.normal_(std=0.2)
    source = shaped(model, tmp_path / "source", {})
    made = export_plain(source, tmp_path / "out", Settings(device="cpu"))
    assert made.notes == ("3 matrices of another form are multiplied out",)
    before, after = (
        AutoModelForCausalLM.from_pretrained(f).eval() for f in (source, tmp_path / "out")
    )
    assert same(before, after)
    torch.testing.assert_close(
        after.model.layers[0].mlp.down_proj.weight,
        dense_weight(before.model.layers[0].mlp.down_proj),
    )


REFUSED = {
    "MLP widths": ("llama", {"layers.1.mlp": 40}, None, "layers.1.mlp 40", "--tier plain"),
    "values": ("gpt2", {"layers.2.value_output": 3}, None, "layers.2.value_output 3", "--plan"),
    "gone": ("llama", {"layers.1.value_output": 0}, None, "0 is gone", "layers.1.value_output"),
    "pairs by head": ("llama", {"query_key": 4}, [[0, 1], [2, 3]], "rotary pairs", "layers.0"),
    "pairs by layer": (
        *("llama", {"query_key": 4, "value_output": 4}),
        *([[[0, 1]] * 2, [[2, 3]] * 2, [[0, 1]] * 2], "layers.1.query_key", "layers.0.query_key"),
    ),
    "values under norms": ("qwen3", {"value_output": 3}, None, "one width", "--to gguf"),
    "a class's own limit": ("opt", {"heads": 3}, None, "divisible", "opt"),
    "a bias in the way": ("qwen2", {"value_output": 3}, None, "o_proj.bias", "mimo_v2_flash"),
    "unequal and windows": ("mistral", {"value_output": 3}, None, "sliding windows", "one width"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_stands_in_the_way_is_named(exported, tmp_path, case):
    *given, first, second = REFUSED[case]
    with pytest.raises(InputError) as refused:
        exported(*given)
    assert first in str(refused.value)
    assert second in str(refused.value)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_plain_checkpoint_is_left_alone(dense, tmp_path):
    with pytest.raises(InputError, match="as it is"):
        export_plain(dense("llama"), tmp_path / "out", Settings(device="cpu"))


def test_a_wrong_checkpoint_never_appears(opened, tmp_path, monkeypatch):
    """Without the scale in the queries it is another model."""

    def forgetful(model, stock):
        scales = [block.attention.module.scaling for block in model.blocks]
        conform(model, stock)
        for block, scale in zip(model.blocks, scales, strict=True):
            block.attention.module.scaling = scale

    monkeypatch.setattr("secateur.export.checkpoint.conform", forgetful)
    sizes = {"query_key": 6, "value_output": 6}
    source = shaped(opened("llama"), tmp_path / "source", sizes, SHARED)
    with pytest.raises(RunError, match="not the model"):
        export_plain(source, tmp_path / "out", Settings(device="cpu"))
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_the_config_stands_without_the_package(exported, tmp_path):
    exported("llama", {"mlp": 40})
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {"secateur", "auto_map"}.isdisjoint(content)
    assert content["architectures"] == ["LlamaForCausalLM"]
    assert not list((tmp_path / "out").glob("*.py"))
    assert AutoConfig.from_pretrained(tmp_path / "out").intermediate_size == 40
    assert open_model(tmp_path / "out", Settings(device="cpu")).blocks
