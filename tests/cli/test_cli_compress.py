"""``compress`` end to end, its report, and plans given back to it."""

import json
import math
import sys

import pytest
from conftest import SMALL, report_of

JUDGED = {"parameters", "bytes", "perplexity", "tasks", "speed", "peak_memory_bytes"}
STAGES = ("calibrate", "curves", "allocate", "apply", "save", "evaluate", "total")


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_stdout_is_the_report(finished):
    out, shown = finished
    assert json.loads(shown.out) == report_of(out)


def test_only_the_result_is_left(finished):
    out, _ = finished
    assert [entry.name for entry in out.parent.iterdir()] == ["out"]
    record = {entry.name for entry in (out / "secateur").iterdir()}
    (selection,) = (name for name in record if name.startswith("selection-"))
    assert record == {"plan.json", selection, "report.json", "recipe.yaml", "report.html"}


def test_report_has_its_keys(finished, model, text):
    report = report_of(finished[0])
    assert set(report["dense"]) >= JUDGED
    assert set(report["compressed"]) >= JUDGED
    assert set(report["budget"]) == {"keep", "of", "total", "reached", "batch", "length"}
    assert {*STAGES, "calibration_forward"} <= set(report["seconds"])
    assert report["tier"] in ("plain", "per-layer")
    assert report["method"]["name"] == "auto"
    assert report["allocator"] == {"name": "knapsack", "options": {"cells": 20_000}}
    assert report["seed"] == 0
    assert {"secateur", "python", "torch", "transformers"} <= set(report["versions"])
    assert report["calibration"]["source"] == str(text)
    assert report["model"]["source"] == str(model)


def test_recipe_says_what_was_asked_for(finished, model, text):
    import yaml

    recipe = yaml.safe_load((finished[0] / "secateur" / "recipe.yaml").read_text())
    report = report_of(finished[0])
    assert (recipe["model"], recipe["calibration"]["source"]) == (str(model), str(text))
    (step,) = recipe["steps"]
    assert {"name": step["method"], "options": step["options"]} == report["method"]
    assert step["keep"] == report["budget"]["keep"]
    asked = {"target": "parameters", "multiple_of": 8, "latency_batch": 1, "latency_length": 256}
    assert step.items() >= asked.items()


def test_report_numbers_are_finite_and_plausible(finished):
    report = report_of(finished[0])
    for side in ("dense", "compressed"):
        judged = report[side]
        numbers = [*judged["perplexity"].values(), *judged["speed"].values()]
        assert all(math.isfinite(n) and n > 0 for n in numbers)
        assert judged["peak_memory_bytes"] > 0
        assert {"prefill_tokens_per_second", "decode_tokens_per_second"} <= set(judged["speed"])
    seconds = report["seconds"]
    assert seconds["total"] >= sum(seconds[stage] for stage in STAGES[:-1]) - 0.1


def test_bytes_are_those_on_disk(finished, model):
    out, report = finished[0], report_of(finished[0])
    assert report["dense"]["bytes"] == (model / "model.safetensors").stat().st_size
    assert report["compressed"]["bytes"] == (out / "model.safetensors").stat().st_size


def test_parameters_and_budget_are_those_of_the_weights(finished, model):
    from safetensors.torch import load_file

    out, report = finished[0], report_of(finished[0])
    counts = {}
    for side, folder in (("dense", model), ("compressed", out)):
        tensors = load_file(folder / "model.safetensors")
        counts[side] = sum(t.numel() for t in tensors.values() if t.is_floating_point())
        assert report[side]["parameters"] == counts[side]
    compressible = 2 * (3 * 64 * 32 + 2 * 8 * 32 * 6)
    lost = (counts["dense"] - counts["compressed"]) / compressible
    assert report["budget"]["reached"] == pytest.approx(1 - lost)
    assert report["budget"]["total"] == compressible
    assert 0.78 < report["budget"]["reached"] <= 0.8


def test_dense_perplexity_is_that_of_a_direct_computation(finished, model, held):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = tokenizer(held.read_text(), add_special_tokens=False, return_tensors="pt")["input_ids"]
    losses = []
    for start in (0, 32):
        window = ids[:, start : start + 32]
        with torch.inference_mode():
            losses.append(float(module(input_ids=window, labels=window).loss))
    expected = math.exp(sum(losses) / 2)
    assert report_of(finished[0])["dense"]["perplexity"]["held.txt"] == pytest.approx(expected)


def test_result_is_opened_by_transformers(finished, model):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import secateur  # noqa: F401 - registers

    out = finished[0]
    small = AutoModelForCausalLM.from_pretrained(out)
    assert AutoTokenizer.from_pretrained(out).get_vocab()
    ids = torch.arange(10).unsqueeze(0)
    assert torch.isfinite(small(input_ids=ids).logits).all()
    parameters = sum(p.numel() for p in small.parameters())
    assert parameters == report_of(out)["compressed"]["parameters"]


def test_table_shows_dense_beside_compressed(compress, room):
    shown = compress().succeeded()
    for word in (
        "dense",
        "compressed",
        "perplexity, held.txt",
        "bytes on disk",
        "asked for 80.00%",
    ):
        assert word in shown.out
    for word in ("tier", "report.json", "next: secateur eval"):
        assert word in shown.out
    assert max(len(line) for line in shown.out.splitlines() if str(room) not in line) <= 100
    assert [entry.name for entry in room.iterdir()] == ["out"]


def test_the_same_command_gives_the_same_bytes(finished, compress, room, forget):
    forget()
    compress().succeeded()
    assert weights(room / "out") == weights(finished[0])
    again, first = ((f / "secateur" / "plan.json").read_text() for f in (room / "out", finished[0]))
    assert again == first


def test_a_plan_of_a_run_gives_the_same_bytes(finished, run, model, held, room, near, forget):
    forget()
    plan = finished[0] / "secateur" / "plan.json"
    judge = ["--eval", held, "--no-speed", "--eval-windows", 2, "--new-tokens", 4]
    shown = run("compress", model, room / "out", "--plan", plan, *judge).succeeded()
    assert weights(room / "out") == weights(finished[0])
    assert (room / "out" / "secateur" / "plan.json").read_text() == plan.read_text()
    assert "other calibration tokens" not in shown.err


def test_a_plan_needs_no_other_argument_to_be_repeated(finished, run, model, room, near):
    plan = finished[0] / "secateur" / "plan.json"
    run("compress", model, room / "out", "--plan", plan, "--no-speed").succeeded()
    assert weights(room / "out") == weights(finished[0])


@pytest.mark.parametrize(
    "flags", [(), ("--method", "modegpt"), ("--target", "bytes", "--allocator", "uniform")], ids=str
)
def test_plan_then_compress_is_compress(run, model, text, held, room, near, forget, flags):
    given = ["--calibration", text, "--samples", 4, "--length", 32, "--keep", 0.7, *flags]
    judge = ["--eval", held, "--no-speed", "--eval-windows", 2, "--new-tokens", 4]
    run("plan", model, *given, "-o", room / "plan.json").succeeded()
    run("compress", model, room / "one", "--plan", room / "plan.json", *judge).succeeded()
    forget()
    run("compress", model, room / "two", *given, *judge).succeeded()
    assert weights(room / "one") == weights(room / "two")


def test_default_texts_are_unseen_and_two(run, model, text, room, near):
    given = ["--calibration", text, *SMALL, "--json"]
    shown = run("compress", model, room / "out", *given).succeeded()
    assert list(json.loads(shown.out)["dense"]["perplexity"]) == [
        "rest of calibration.txt",
        "Python docs (bundled)",
    ]


def test_keep_everything_is_the_same_model(compress, model, room):
    from safetensors.torch import load_file

    compress("--keep", 1).succeeded()
    report = report_of(room / "out")
    assert report["tier"] == "plain"
    assert report["budget"]["reached"] == 1
    before, after = (load_file(f / "model.safetensors") for f in (model, room / "out"))
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)


def test_a_compressed_model_is_refused_as_input(finished, compress, room):
    compress(source=finished[0]).refused("already compressed")
    assert list(room.iterdir()) == []


def test_a_compressed_model_can_be_evaluated_and_inspected(finished, run, held, near):
    report = report_of(finished[0])
    judge = ["--eval", held, "--eval-length", 32, "--eval-windows", 2, "--no-speed", "--json"]
    found = json.loads(run("eval", finished[0], *judge).succeeded().out)
    assert found["perplexity"] == pytest.approx(report["compressed"]["perplexity"])
    shown = json.loads(run("inspect", finished[0], "--json").succeeded().out)
    assert shown["parameters"] == report["compressed"]["parameters"]


@pytest.mark.parametrize("method", ["auto", "modegpt"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_number_formats(compress, room, dtype, method):
    compress("--dtype", dtype, "--method", method).succeeded()
    assert report_of(room / "out")["budget"]["reached"] <= 0.8


def test_progress_goes_to_stderr(compress):
    shown = compress("--json").succeeded()
    json.loads(shown.out)
    assert "measuring the dense model" in shown.err


@pytest.mark.skipif(sys.platform == "win32", reason="terminals differ")
def test_bars_show_at_a_terminal(compress, monkeypatch):
    from secateur.utils import progress

    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    compress("--json").succeeded()
