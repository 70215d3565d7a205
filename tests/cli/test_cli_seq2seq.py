"""Text-to-text models on the command line."""

import json

import pytest
import torch
from conftest import report_of, sizes
from safetensors.torch import load_file

from tests.support import families

KEPT = ["--keep", "0.7", "--method", "modegpt"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, the same with a tokenizer that has no sentinels, and a text."""
    root = tmp_path_factory.mktemp("seq2seq")
    families.save(families.random_model("t5"), root / "t5")
    families.save(families.random_model("t5"), root / "bare")
    families.tokenizer().save_pretrained(root / "bare")
    (root / "words.txt").write_text(families.words(2000))
    return root


@pytest.fixture
def source(folder):
    return ["--calibration", folder / "words.txt", "--samples", 16, "--length", 32]


@pytest.fixture(scope="module")
def runs():
    """The output of a run that no test changes, and what was shown."""
    return {}


@pytest.fixture
def made(runs, folder, source, run, near, tmp_path_factory):
    if not runs:
        out = tmp_path_factory.mktemp("made") / "out"
        given = [*source, *KEPT, "--eval-windows", 6, "--new-tokens", 7]
        found = run("compress", folder / "t5", out, *given).succeeded()
        runs["t5"] = out, found.err + found.out
    return runs["t5"]


def test_a_run_reports_what_is_found_written_and_agreed_on(made):
    out, shown = made
    report = report_of(out)
    for side in ("dense", "compressed"):
        one = report[side]
        assert 0 <= one["tasks"]["target tokens found, rest of words.txt"] <= 1
        assert one["counts"] == "target tokens"
        assert one["tokens"]["rest of words.txt"] == 6 * (5 + 2 + 2)  # hidden, sentinels, ends
        assert len(one["sample"].split()) == 7
        assert one["speed"]["decode_tokens_per_second"] > 0
    assert report["compressed"]["agreement"]["kl"] > 0
    assert report["budget"]["reached"] <= 0.7
    assert "attention to the encoder" in shown
    assert "nan" not in shown


def test_the_result_is_measured_like_any_model(made, folder, run, near):
    out, _ = made
    given = ["--eval", folder / "words.txt", "--eval-length", 32, "--no-speed"]
    measurements = json.loads(run("eval", out, *given, "--json").succeeded().out)
    assert measurements["parameters"] == report_of(out)["compressed"]["parameters"]
    assert "target tokens" in run("eval", out, *given).succeeded().out
    content = json.loads(run("inspect", folder / "t5", "--json").succeeded().out)
    assert {unit["kind"] for unit in content["units"]} == {"mlp", "query_key", "value_output"}
    assert {unit["count"] for unit in content["units"]} == {3}
    assert any("attention to the encoder" in note for note in content["notes"])


def test_a_plan_makes_the_same_again(made, folder, source, run, near, room):
    out, _ = made
    run("plan", folder / "t5", *source, *KEPT, "-o", room / "p.json").succeeded()
    plan = json.loads((room / "p.json").read_text())
    assert sizes(plan) == sizes(json.loads((out / "secateur" / "plan.json").read_text()))
    given = ["--plan", room / "p.json", "--eval-windows", 2, "--no-speed"]
    run("compress", folder / "t5", room / "out", *given).succeeded()
    before, after = (load_file(f / "model.safetensors") for f in (out, room / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("t5", ["--method", "slicegpt"], ["slicegpt", "residual stream", "modegpt"]),
        ("t5", ["--method", "shortgpt"], ["shortgpt", "position bias", "modegpt"]),
        ("t5", ["--select-calibration", "dpp"], ["--select-calibration dpp", "text-to-text"]),
        ("t5", ["--length", 2], ["2 tokens", "at least 3"]),
        ("t5", ["--length", 200], ["<extra_id_5>", "sentinels", "--length"]),
        ("bare", [], ["<extra_id_0>", "sentinels"]),
    ],
)
def test_what_cannot_be_done_is_refused(run, folder, source, room, name, flags, words):
    given = [*source, "--keep", 0.8, *flags]
    run("plan", folder / name, *given, "-o", room / "p.json").refused(*words)
    assert list(room.iterdir()) == []


def test_a_budget_of_cache_is_spent_in_the_decoder(run, folder, source):
    flags = ["--method", "modegpt", "--target", "cache", "--keep", "0.5", "--dry-run", "--json"]
    plan = json.loads(run("plan", folder / "t5", *source, *flags).succeeded().out)
    narrowed = {row["unit"] for row in plan["units"] if row["after"] < row["before"]}
    assert plan["budget"]["total"] == 4 * 4 * (8 + 8)  # one block of four heads
    assert narrowed
    assert all(name.startswith("layers.2.") for name in narrowed)
