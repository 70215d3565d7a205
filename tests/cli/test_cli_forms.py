"""Matrices of another form at the command line: compress, plan, inspect, export, and refusals."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

LOW = ["--method", "svd-llm", "--rank-step", "2"]


def config(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.fixture
def small(compress, room):
    """A checkpoint of low rank."""
    compress(*LOW, "--keep", "0.8").succeeded()
    return room / "out"


def test_compress_writes_factors_of_less_than_the_bytes_asked_for(small):
    report = json.loads((small / "secateur" / "report.json").read_text())
    assert report["tier"] == "factored"
    assert report["budget"]["of"] == "bytes"
    assert 0.7 < report["budget"]["reached"] <= 0.8
    forms = config(small)["secateur"]["layers"][0]["forms"]
    assert {form["form"] for form in forms.values()} == {"low_rank"}
    tensors = load_file(small / "model.safetensors")
    for path, form in forms.items():
        name = f"model.layers.0.{path}.first.weight"
        assert tensors[name].shape == (form["rank"], form["inputs"])


def test_a_plan_names_forms_and_is_replayed(plan, replay):
    content = plan(*LOW, "--keep", "0.8")
    row = content["units"][0]
    assert row["kind"] == "matrix"
    assert row["becomes"] == f"rank {row['form']['rank']}"
    report = replay(content)
    assert report["budget"]["reached"] == content["budget"]["reached"]


def test_keep_stays_what_it_was_where_nothing_is_asked(plan):
    content = plan(*LOW)
    assert content["budget"]["keep"] == 0
    assert {row["after"] for row in content["units"]} == {1}


def test_compressed_checkpoints_go_on_by_forms_alone(compress, room, model):
    compress("--keep", "0.8", "--method", "modegpt").succeeded()
    shutil.move(room / "out", room / "first")
    refused = compress("--keep", "0.8", "--method", "modegpt", source=room / "first")
    refused.refused("already compressed", "svd-llm")
    compress(*LOW, "--keep", "0.8", source=room / "first").succeeded()
    before, after = (config(room / name)["secateur"]["layers"] for name in ("first", "out"))
    for old, new in zip(before, after, strict=True):
        assert old.items() <= new.items()
        assert new["forms"]


def test_inspect_shows_errors_against_bytes(run, model, given):
    shown = run("inspect", model, "--forms", "svd,svd-llm", *given).succeeded()
    assert max(map(len, shown.out.splitlines())) <= 100
    content = json.loads(run("inspect", model, "--forms", "svd,svd-llm", *given, "--json").out)
    plain, aware = content["methods"]["svd"], content["methods"]["svd-llm"]
    pairs = [(a, b) for a, b in zip(aware, plain, strict=True) if a is not None]
    assert pairs
    assert all(a < b for a, b in pairs)
    run("inspect", model, "--forms", "svdllm", *given).refused("svd-llm")
    run("inspect", model, "--forms", "flap", *given).refused("keeps no width", "svd")


def test_export_multiplies_out_into_a_stock_checkpoint(run, small, room, near, tmp_path):
    run("export", small, room / "dense", "--dense").succeeded()
    assert config(room / "dense")["model_type"] == "llama"
    assert [p.name for p in (room / "dense").glob("*.py")] == []
    stock = AutoModelForCausalLM.from_pretrained(room / "dense")
    factored = AutoModelForCausalLM.from_pretrained(small)
    ids = torch.arange(12).unsqueeze(0)
    torch.testing.assert_close(stock(ids).logits, factored(ids).logits, rtol=1e-4, atol=1e-5)
    assert type(stock).__name__ == "LlamaForCausalLM"


def test_export_refuses_what_it_cannot_do(run, small, model, room):
    run("export", model, room / "d", "--dense").refused("dense already")
    run("export", small, room / "d").refused("--dense")
    run("export", small, small, "--dense").refused("holds")
    assert not (room / "d").exists()


def change(folder, edit):
    content = config(folder)
    edit(content["secateur"]["layers"][0]["forms"])
    (folder / "config.json").write_text(json.dumps(content))


def spec(**changes):
    return lambda forms: forms["mlp.up_proj"].update(changes)


HOSTILE = {
    "rank above the matrix": (spec(rank=33), "at most 32"),
    "another rank": (spec(rank=1), "not from the same model"),
    "huge": (spec(outputs=2**30), "are"),
    "text": (spec(rank="4"), "whole number"),
    "unknown form": (spec(form="pickle"), "low_rank"),
    "a path outside": (lambda f: f.update({"../../x": f.pop("mlp.up_proj")}), "no linear layer"),
    "a path to no linear": (lambda f: f.update(mlp=f.pop("mlp.up_proj")), "no linear layer"),
    "a number for a spec": (lambda f: f.update({"mlp.up_proj": 3}), "its form"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_specs_are_refused_before_weights_are_read(run, small, what, given):
    edit, words = HOSTILE[what]
    change(small, edit)
    run("eval", small, "--no-speed", "--eval", given[1]).refused(words)


@pytest.mark.parametrize("what", ["missing", "shape", "dtype"])
def test_tensors_that_do_not_fit_their_spec_are_refused(run, small, what, given):
    path, name = small / "model.safetensors", "model.layers.1.mlp.up_proj.first.weight"
    tensors = load_file(path)
    tensor = tensors.pop(name)
    if what != "missing":
        tensors[name] = tensor[1:].clone() if what == "shape" else tensor.to(torch.uint8)
    save_file(tensors, path, metadata={"format": "pt"})
    run("eval", small, "--no-speed", "--eval", given[1]).refused(name)
    if what == "missing":  # nor are they made up for those who load it without this package
        with pytest.raises(ValueError, match="missing"):
            AutoModelForCausalLM.from_pretrained(small)


def test_codes_that_say_nothing_are_refused(run, compress, room, given):
    flags = ["--method", "ptqtp", "--groups", "8", "--no-speed"]
    compress(*flags).succeeded()
    path, name = room / "out" / "model.safetensors", "model.layers.0.mlp.up_proj.codes"
    tensors = load_file(path)
    tensors[name][:] = 3**5
    save_file(tensors, path, metadata={"format": "pt"})
    run("eval", room / "out", "--no-speed", "--eval", given[1]).refused("up_proj", "242")
    run("export", room / "out", room / "d", "--dense").refused("up_proj", "242")


def test_a_method_without_a_form_for_a_model_says_so(refused):
    refused("--method", "svd", "--rank-step", "64", words=("smaller",))


def test_tier_plain_has_no_place_for_factors(refused):
    refused(*LOW, "--tier", "plain", words=("no stock class",))
    refused(*LOW, "--target", "latency", "--keep", "0.9", words=("bytes",))
