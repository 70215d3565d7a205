"""``ls``, ``inspect``, ``plan`` and ``eval``: tables for people, JSON for machines."""

import json
import re

import pytest
from conftest import SMALL

from secateur.allocate import ALLOCATORS
from secateur.methods import METHODS, method_class
from secateur.structure.units import MATRICES

CALIBRATION = ["--samples", "4", "--length", "32"]
JUDGE = ["--no-speed", "--eval-windows", "2", "--new-tokens", "4", "--eval-length", "32"]


def narrow_enough(text):
    return max(map(len, text.splitlines())) <= 100


@pytest.fixture(scope="session")
def bloom(tmp_path_factory, tokenizer):
    from conftest import save_checkpoint
    from transformers import BloomConfig

    config = BloomConfig(vocab_size=320, hidden_size=32, n_layer=2, n_head=4)
    return save_checkpoint(tmp_path_factory.mktemp("models") / "bloom", config, tokenizer)


def test_ls_shows_methods_options_and_families(run):
    shown = run("ls").succeeded()
    for word in ("auto", "modegpt", "--temperature", "2408.09632", "llama", "gpt_neox"):
        assert word in shown.out
    assert narrow_enough(shown.out)
    assert shown.err == ""


def test_ls_json(run):
    content = json.loads(run("ls", "--json").succeeded().out)
    methods = {method["name"]: method for method in content["methods"]}
    assert list(methods) == list(METHODS)
    for name, method in methods.items():
        reshapes = method_class(name).kinds == MATRICES
        assert method["keep"] == ("least" if reshapes else 0.8)
    assert set(methods["auto"]["options"]) == {"ridge", "iterations"}
    assert set(methods["flap"]["options"]) == {"compensate"}
    allocators = {"auto": "knapsack", "modegpt": "influence", "flap": "fluctuation"}
    assert {name: methods[name]["allocator"] for name in allocators} == allocators
    options = {a["name"]: set(a["options"]) for a in content["allocators"]}
    assert list(options) == list(ALLOCATORS)
    assert options["uniform"] == options["plain"] == options["fluctuation"] == set()
    assert options["influence"] == {"temperature", "max_sparsity"}
    assert options["knapsack"] == {"cells"}
    assert "llama" in {t for family in content["families"] for t in family["model_types"]}


def test_ls_shows_allocators_with_their_options_and_whose_default_they_are(run):
    shown = run("ls").succeeded().out
    _, *parts = re.split(r"^(methods|allocators|families)$", shown, flags=re.MULTILINE)
    entries = {name: entries_of(lines) for name, lines in zip(parts[::2], parts[1::2], strict=True)}
    assert list(entries["allocators"]) == list(ALLOCATORS)
    assert list(entries["methods"]) == list(METHODS)
    assert "--" not in entries["allocators"]["uniform"]
    assert "--temperature" in entries["allocators"]["influence"]
    assert "(default 0.95)" in entries["allocators"]["influence"]
    assert "--cells" in entries["allocators"]["knapsack"]
    assert "(default 20000)" in entries["allocators"]["knapsack"]
    assert "--temperature" not in entries["methods"]["modegpt"]
    for method, allocator in (("auto", "knapsack"), ("modegpt", "influence")):
        assert f"by default {allocator}" in entries["methods"][method]


def entries_of(lines):
    """Name to text of the entries of a group of ``ls``; their options are indented further."""
    _, *parts = re.split(r"^ {2}([\w-]+) ", lines, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_inspect_counts_what_the_weights_hold(run, model):
    from transformers import AutoModelForCausalLM

    content = json.loads(run("inspect", model, "--json").succeeded().out)
    module = AutoModelForCausalLM.from_pretrained(model)
    assert content["parameters"] == sum(p.numel() for p in module.parameters())
    assert content["linear_layers"] == 2 * 7 + 1
    assert content["blocks"] == 2
    inside = sum(p.numel() for name, p in module.named_parameters() if "_proj" in name)
    assert content["compressible_parameters"] == inside
    assert [unit["kind"] for unit in content["units"]] == ["mlp", "query_key", "value_output"]


def test_inspect_for_people_says_what_to_type_next(run, model):
    shown = run("inspect", model).succeeded()
    assert "mlp" in shown.out
    assert "next: secateur plan" in shown.out
    named = [line for line in shown.out.splitlines() if str(model) not in line]
    assert narrow_enough("\n".join(named))


def test_inspect_reads_no_weights(run, broken):
    (broken / "model.safetensors").unlink()
    run("inspect", broken).succeeded()


def test_inspect_takes_the_multiple(run, model):
    content = json.loads(run("inspect", model, "--json", "--multiple-of", 16).out)
    assert content["units"][0]["step"] == 16


def test_inspect_of_an_unknown_family_says_what_can_be_done(run, bloom):
    shown = " ".join(run("inspect", bloom).succeeded().out.split())
    for word in ("bloom", "linear layers", "secateur eval", "Families served", "llama"):
        assert word in shown
    content = json.loads(run("inspect", bloom, "--json").succeeded().out)
    assert content["family"] is None
    assert content["linear_layers"] == 2 * 4 + 1


@pytest.mark.parametrize("command", ["plan", "compress"])
def test_an_unknown_family_is_refused(run, bloom, text, room, command, near):
    out = [room / "out"] if command == "compress" else ["--output", room / "plan.json"]
    if command == "compress":
        found = run("compress", bloom, *out, "--calibration", text, *SMALL)
    else:
        found = run("plan", bloom, *out, "--calibration", text, *CALIBRATION)
    found.refused("bloom", "llama", "gpt_neox", "inspect", "eval")
    assert list(room.iterdir()) == []
    assert near == []


def test_eval_measures_an_unknown_family(run, bloom, held, near):
    run("eval", bloom, "--eval", held, *JUDGE).succeeded()


def test_plan_writes_a_file_for_compress(run, model, text, room):
    shown = run("plan", model, "--calibration", text, *CALIBRATION, "-o", room / "p.json")
    shown.succeeded()
    plan = json.loads((room / "p.json").read_text())
    assert plan["budget"]["reached"] <= 0.8
    assert plan["budget"]["reached"] > 0.79 - 0.01
    assert "next: secateur compress" in shown.out
    assert [entry.name for entry in room.iterdir()] == ["p.json"]


def test_plan_table_has_a_row_a_unit(run, model, text):
    shown = run("plan", model, "--calibration", text, *CALIBRATION, "--dry-run").succeeded()
    rows = [line.split()[0] for line in shown.out.splitlines() if line.count("→") == 1]
    kinds = ("mlp", "query_key", "value_output")
    assert rows == [f"layers.{block}.{kind}" for block in (0, 1) for kind in kinds]
    assert narrow_enough(shown.out)
    assert "asked for 80.00%" in shown.out


def test_dry_run_writes_nothing(run, model, text, room, monkeypatch):
    monkeypatch.chdir(room)
    shown = run("plan", model, "--calibration", text, *CALIBRATION, "--dry-run").succeeded()
    assert list(room.iterdir()) == []
    assert "no file was written" in shown.out


def test_plan_json_is_the_file(run, model, text, room):
    given = ["plan", model, "--calibration", text, *CALIBRATION, "-o", room / "p.json", "--json"]
    assert run(*given).succeeded().out == (room / "p.json").read_text()


@pytest.mark.parametrize("method", ["auto", "modegpt", "flap"])
def test_plan_is_the_same_every_time(run, model, text, forget, method):
    given = ["plan", model, "--calibration", text, *CALIBRATION, "--dry-run", "--json"]
    given += ["--method", method]
    first = run(*given).succeeded().out
    forget()  # or the scores of the first would serve the second
    assert run(*given).out == first
    assert run(*given, "--seed", 1).succeeded().out != first


def test_plan_takes_the_options_of_its_method(run, model, text):
    given = ["plan", model, "--calibration", text, *CALIBRATION, "--dry-run", "--json"]
    given += ["--method", "modegpt", "--leverage-ridge", 0.5, "--temperature", 1e6, "--keep", 0.7]
    plan = json.loads(run(*given).succeeded().out)
    assert plan["method"]["name"] == "modegpt"
    assert plan["method"]["options"]["leverage_ridge"] == 0.5
    assert plan["allocator"]["name"] == "influence"
    assert plan["allocator"]["options"] == {"temperature": 1e6, "max_sparsity": 0.95}
    first, second = ({r["kind"]: r["after"] for r in plan["units"][i : i + 3]} for i in (0, 3))
    assert abs(first["mlp"] - second["mlp"]) <= 8  # hot is uniform


def test_plan_takes_the_options_of_the_default_method(run, model, text):
    given = ["plan", model, "--calibration", text, *CALIBRATION, "--dry-run", "--json"]
    given += ["--ridge", 0.5, "--iterations", 1, "--cells", 300]
    plan = json.loads(run(*given).succeeded().out)
    assert plan["method"]["name"] == "auto"
    assert plan["method"]["options"] == {"ridge": 0.5, "iterations": 1}
    assert plan["allocator"] == {"name": "knapsack", "options": {"cells": 300}}


def test_a_smaller_keep_keeps_less(run, model, text):
    given = ["plan", model, "--calibration", text, *CALIBRATION, "--dry-run", "--json"]
    reached = [
        json.loads(run(*given, "--keep", keep).out)["budget"]["reached"] for keep in (1, 0.7, 0.4)
    ]
    assert reached[0] == 1
    assert 0.7 >= reached[1] > 0.68
    assert 0.4 >= reached[2] > 0.38


def test_plan_does_not_replace_a_file_unasked(run, model, text, room):
    (room / "p.json").write_text("mine")
    given = ["plan", model, "--calibration", text, *CALIBRATION, "-o", room / "p.json"]
    run(*given).refused("p.json", "exists", "--overwrite")
    assert (room / "p.json").read_text() == "mine"
    run(*given, "--overwrite").succeeded()
    assert json.loads((room / "p.json").read_text())["version"] == 3


def test_eval_shows_a_table_and_a_sample(run, model, held, near):
    shown = run("eval", model, "--eval", held, *JUDGE, "--prompt", "the old wood").succeeded()
    for word in ("parameters", "bytes on disk", "perplexity, held.txt (64 tokens)", "the old wood"):
        assert word in shown.out
    assert narrow_enough(shown.out)


def test_eval_json_in_a_process_of_its_own(secateur, model, held):
    shown = secateur("eval", model, "--eval", held, "--json", *JUDGE[1:])
    content = json.loads(shown.succeeded().out)
    assert content["bytes"] == (model / "model.safetensors").stat().st_size
    assert set(content["speed"]) >= {"prefill_tokens_per_second", "decode_tokens_per_second"}
    assert min(content["speed"].values()) > 0
    assert content["peak_memory_bytes"] > 0
    assert content["tokens"] == {"held.txt": 64}


def test_eval_judges_every_text(run, model, text, held, near):
    shown = run("eval", model, "--eval", held, "--eval", text, "--json", *JUDGE).succeeded()
    assert list(json.loads(shown.out)["perplexity"]) == ["held.txt", "calibration.txt"]


def test_texts_of_one_name_are_both_judged(run, model, held, text, tmp_path, near):
    texts = [tmp_path / "a" / "test.txt", tmp_path / "b" / "test.txt"]
    for path, source in zip(texts, (held, text), strict=True):
        path.parent.mkdir()
        path.write_text(source.read_text())
    shown = run("eval", model, "--eval", texts[0], "--eval", texts[1], "--json", *JUDGE)
    assert len(json.loads(shown.succeeded().out)["perplexity"]) == 2


def test_default_text_of_eval_is_the_bundled_one(run, model, near):
    shown = run("eval", model, "--json", *JUDGE).succeeded()
    assert list(json.loads(shown.out)["perplexity"]) == ["Python docs (bundled)"]


def test_names_with_brackets_are_shown_as_they_are(run, broken):
    named = broken.rename(broken.parent / "old[bold]v2")
    shown = run("inspect", named).succeeded()
    assert "old[bold]v2" in shown.out.replace("\n", "")
