"""The short form and the end of the long one, with their fresh processes."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from secateur import Budget, Calibration, InputError, Questions, Text, compress, save
from secateur.structure.units import DEPTH
from tests.contract.conftest import EVERYWHERE, spread
from tests.support.families import WIDTH, words


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(words(1500))
    return path


def test_compress_writes_a_checkpoint_its_report_and_its_plan(
    dense, tmp_path, method, text, request
):
    """One method's run measures in a process of its own; for the others that is a call."""
    if method.name != EVERYWHERE:
        request.getfixturevalue("near")
    out = tmp_path / "small"
    report = compress(
        dense("llama"),
        out,
        method(),
        Budget(keep=0.7),
        calibration=Calibration(str(text), 8, 32, 0),
        questions=Questions((Text("words", str(text), 0.8),), 32, 4, new_tokens=4, speed=False),
    )
    assert report["budget"]["reached"] <= 0.7
    assert report["compressed"]["parameters"] < report["dense"]["parameters"]
    plan = json.loads((out / "secateur" / "plan.json").read_text())
    widths = {row["unit"]: row["after"] for row in plan["units"]}
    model = AutoModelForCausalLM.from_pretrained(out)
    if method.kinds == DEPTH:
        assert len(model.model.layers) == sum(widths.values()) == 2
        widths = {}
    for i, layer in enumerate(model.model.layers):
        assert layer.mlp.down_proj.in_features == widths.get(f"layers.{i}.mlp", WIDTH)
    assert (out / "secateur" / "report.json").exists()
    assert (out / "secateur" / "recipe.yaml").exists()


@pytest.mark.parametrize("name", ["llama_biased_tied"])  # which is slow for most methods
def test_save_publishes_only_what_reloads(opened, calibrated, planned, tmp_path, method, name):
    data, model = calibrated(name), opened(name)
    plan = planned(model, name, method(), keep=0.7)
    save(model, tmp_path / "small", plan, data.store, data.tokens)
    assert load_file(tmp_path / "small" / "model.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.bfloat16)
    ids = data.tokens.ids[:1]
    with torch.inference_mode():
        expected = model.module(input_ids=ids).logits.float()  # left in bfloat16
        assert spread(loaded(input_ids=ids).logits, expected) < 0.02


def test_a_plan_fits_only_its_own_model(opened, calibrated, planned, tmp_path, method):
    data = calibrated("llama")
    plan = planned(opened("llama"), "llama", method(), keep=0.7)
    with pytest.raises(InputError, match="another model"):
        save(opened("mistral"), tmp_path / "small", plan, data.store, data.tokens)
    assert not (tmp_path / "small").exists()
