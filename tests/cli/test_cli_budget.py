"""What a budget counts, who spends it, and what the plan shows."""

import json
import re

import pytest
from conftest import ALLOCATORS, COUNTED, PARAMETERS, WHOLE, sizes

# Defaults, targets, allocators


def test_the_defaults_are_auto_and_knapsack(run, model, given, room, monkeypatch):
    monkeypatch.chdir(room)
    run("plan", model, *given).succeeded()
    written = json.loads((room / "plan.json").read_text())
    assert written["version"] == 3
    assert written["method"]["name"] == "auto"
    assert written["method"]["options"].keys() == {"ridge", "iterations"}
    assert written["asked"]["keep"] == written["budget"]["keep"] == 0.8
    assert written["allocator"] == {"name": "knapsack", "options": {"cells": 20_000}}
    assert written["budget"]["of"] == "parameters"
    assert (written["budget"]["batch"], written["budget"]["length"]) == (1, 256)
    assert all(row["predicted_loss"] is not None for row in written["units"])


def test_no_flags_at_all(run, tmp_path, llama_config, tokenizer, monkeypatch):
    from conftest import save_checkpoint

    config = llama_config(num_hidden_layers=1, intermediate_size=16, max_position_embeddings=256)
    save_checkpoint(tmp_path / "longer", config, tokenizer)
    monkeypatch.chdir(tmp_path)
    run("plan", "./longer").succeeded()
    written = json.loads((tmp_path / "plan.json").read_text())
    assert (written["method"]["name"], written["allocator"]["name"]) == ("auto", "knapsack")
    assert written["calibration"]["source"] == "bundled"
    assert written["calibration"]["tokens"] == 128 * 256
    assert written["budget"]["reached"] <= 0.8


@pytest.mark.parametrize("allocator", ALLOCATORS)
@pytest.mark.parametrize("target", COUNTED)
def test_rows_add_up_to_what_the_budget_reached(plan, target, allocator):
    found = plan("--target", target, "--allocator", allocator, "--keep", 0.6)
    budget = found["budget"]
    assert found["allocator"]["name"] == allocator
    assert (budget["of"], budget["keep"], budget["total"]) == (target, 0.6, WHOLE[target])
    spent = sum(row[COUNTED[target]] for row in found["units"])
    assert spent == round(budget["reached"] * budget["total"])
    assert spent / budget["total"] == budget["reached"]
    assert 0.5 < budget["reached"] <= 0.6


def test_knapsack_spends_nothing_where_it_would_save_nothing(plan):
    """No MLP is cached, so that narrowing one would lose something for nothing."""
    found = plan("--target", "cache", "--keep", 0.4, "--multiple-of", 24)
    assert set(sizes(found, "mlp").values()) == {64}


def test_each_target_is_met_in_its_own_currency(plan):
    """Were all of them counted alike, all plans would be one."""
    plans = {target: sizes(plan("--target", target, "--keep", 0.6)) for target in WHOLE}
    assert plans["cache"] != plans["parameters"]
    assert sum(row["bytes"] for row in plan("--target", "bytes", "--keep", 0.6)["units"]) <= (
        0.6 * WHOLE["bytes"]
    )


def test_a_latency_budget_is_the_time_of_the_whole_pass(plan, machine):
    flags = ("--target", "latency", "--latency-batch", 3, "--latency-length", 16)
    found = plan(*flags, "--keep", 0.6)
    budget = found["budget"]
    assert machine == [(3, 16)]
    assert (budget["of"], budget["batch"], budget["length"]) == ("latency", 3, 16)
    assert budget["total"] == 20_000
    spent = 2400 + sum(
        100 * row["after"] for row in found["units"] if row["kind"] != "value_output"
    )
    spent += sum(200 * row["after"] for row in found["units"] if row["kind"] == "value_output")
    assert budget["reached"] == spent / 20_000
    assert 0.55 < budget["reached"] <= 0.6


def test_times_are_measured_once_for_each_kind_of_pass(plan, machine):
    flags = ["--target", "latency", "--latency-length", 16]
    first = plan(*flags)
    assert plan(*flags, "--keep", 0.5)["budget"]["total"] == first["budget"]["total"]
    assert machine == [(1, 16)]
    plan(*flags, "--latency-batch", 2)
    plan("--target", "latency", "--latency-length", 17)
    assert machine == [(1, 16), (2, 16), (1, 17)]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"forward": 3}'],
    ids=["empty", "cut short", "list", "nothing", "no table"],
)
def test_damaged_times_are_measured_again(plan, machine, content):
    from secateur.io.cache import cached_file

    flags = ("--target", "latency", "--latency-length", 16)
    first = plan(*flags)
    (path,) = cached_file("latency", {}).parent.glob("*.json")
    path.write_text(content)
    assert plan(*flags) == first
    assert len(machine) == 2


def test_a_machine_is_really_timed(plan, forget):
    forget()
    found = plan("--target", "latency", "--latency-length", 16, "--keep", 0.999)
    assert found["budget"]["total"] > 10_000  # ten microseconds: no machine is faster
    assert found["budget"]["reached"] <= 0.999
    assert any(row["after"] < row["before"] for row in found["units"])


def test_a_latency_out_of_reach_says_what_is_within(refused, plan, machine):
    flags = ("--target", "latency", "--latency-length", 16)
    least = 2400 + 2 * (6400 * 8 + 800 * 8 * 2 + 1600 * 8) // 64  # the smallest sizes but 0
    assert least == 4800
    message = refused(
        *flags, "--keep", 0.05, "--allocator", "uniform", words=["out of reach", "4,800 of 20,000"]
    )
    assert "nanoseconds of a forward pass" in message
    assert reach(message) == pytest.approx(0.24, abs=0.0011)
    plan(*flags, "--keep", reach(message), "--allocator", "uniform")
    message = refused(*flags, "--keep", 0.05, words=["out of reach", "2,400 of 20,000"])
    assert set(sizes(plan(*flags, "--keep", reach(message))).values()) == {0}


def test_more_tokens_than_positions_can_not_be_timed(refused, machine):
    refused("--target", "latency", words=["256", "128", "--latency-length"])
    assert machine == []


@pytest.mark.parametrize("allocator", [*ALLOCATORS, None])
def test_widths_are_multiples(plan, allocator):
    flags = ("--tier", "plain") if allocator is None else ("--allocator", allocator)
    made = plan("--multiple-of", 24, "--keep", 0.75, *flags)
    assert made["asked"]["multiple_of"] == 24
    widths = sizes(made, "mlp").values()
    assert set(widths) <= {0, 24, 48, 64}
    assert min(widths) < 64
    whole = sizes(plan("--multiple-of", 24, "--keep", 1, *flags), "mlp").values()
    assert set(whole) == {64}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--allocator", "plane"), ["plane", "did you mean 'plain'"]),
        (("--target", "latncy"), ["latncy", "did you mean 'latency'", "parameters"]),
        (("--target", "flop"), ["flop", "did you mean 'flops'"]),
        (("--tier", "plane"), ["plane", "did you mean 'plain'", "per-layer"]),
        (("--tier", "perlayer"), ["perlayer", "did you mean 'per-layer'"]),
        (("--allocator", "knapsak"), ["knapsak", "did you mean 'knapsack'", "uniform"]),
        (("--allocator", "entropy"), ["entropy", "influence", "knapsack", "uniform"]),
    ],
    ids=lambda value: " ".join(value),
)
@pytest.mark.parametrize("command", ["plan", "compress"])
def test_an_unknown_name_is_refused(refused, compress, near, room, command, flags, words):
    if command == "plan":
        refused(*flags, words=words)
    else:
        compress(*flags).refused(*words)
        assert list(room.iterdir()) == []
    assert near == []


def reach(message):
    """The smallest share that a refusal names."""
    (found,) = re.findall(r"Ask for between (\S+) and 1\.", message)
    return float(found)


@pytest.mark.parametrize(
    ("flags", "least"),
    [
        (("--tier", "plain"), 2 * (8 * 96 + 16 * 192) / PARAMETERS),
        (("--tier", "plain", "--target", "flops", "--multiple-of", 16), 0.5),
        (("--allocator", "uniform"), 2 * (8 * 96 + 3 * 192) / PARAMETERS),
        (("--method", "modegpt", "--target", "cache"), 3 / 16),
        (("--target", "cache"), 2 * 4 / WHOLE["cache"]),  # a number for each token stays
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_a_budget_out_of_reach_names_what_is_within(refused, plan, flags, least):
    message = refused(*flags, "--keep", 0.01, words=["0.010", "out of reach"])
    named = reach(message)
    assert least <= named < least + 0.0015
    assert plan(*flags, "--keep", named)["budget"]["reached"] == pytest.approx(least)
    refused(*flags, "--keep", named - 0.0015, words=["out of reach"])


def test_nothing_is_out_of_reach_where_units_may_go(plan):
    found = plan("--keep", 1e-6)
    assert set(sizes(found).values()) == {0}
    assert found["budget"]["reached"] == 0


# What a plan shows


def table(shown):
    """Unit to (before, after, bytes, prediction), as the table has them."""
    row = re.compile(
        r"^ (layers\S+) +(\d+) → (\d+|removed) +(\d+)% +(\S+ k?B) +(\S+) *$", re.MULTILINE
    )
    found = {unit: rest for unit, *rest in row.findall(shown)}
    assert shown.count("→") == len(found)
    return found


@pytest.mark.parametrize("keep", [0.8, 0.3])
def test_the_table_shows_sizes_bytes_and_losses(run, model, given, plan, room, monkeypatch, keep):
    monkeypatch.chdir(room)
    shown = run("plan", model, *given, "--dry-run", "--keep", keep).succeeded().out
    assert list(room.iterdir()) == []
    assert max(map(len, shown.splitlines())) <= 100
    assert "predicted loss" in shown.splitlines()[1]
    made = plan("--keep", keep)
    found = table(shown)
    assert list(found) == list(sizes(made))
    for row in made["units"]:
        before, after, kept, stored, loss = found[row["unit"]]
        assert (int(before), after) == (row["before"], str(row["after"] or "removed"))
        assert int(kept) == round(100 * row["after"] / row["before"])
        number, prefix = re.fullmatch(r"(\S+) (k?)B", stored).groups()
        assert float(number) * (1000 if prefix else 1) == pytest.approx(row["bytes"], abs=5)
        assert loss == f"{row['predicted_loss']:.5f}"
    total = sum(row["predicted_loss"] for row in made["units"])
    assert f"sum {total:.4f}" in shown.replace("\n", " ")
    assert ("removed" in shown) == (0 in sizes(made).values()) == (keep == 0.3)


def test_the_table_shows_errors_where_no_loss_was_measured(run, model, given, plan, forget):
    forget()
    flags = ("--allocator", "uniform")
    shown = run("plan", model, *given, "--dry-run", *flags).succeeded().out
    assert "predicted error" in shown.splitlines()[1]
    assert "predicted loss" not in shown
    for row in plan(*flags)["units"]:
        assert table(shown)[row["unit"]][-1] == f"{row['predicted_error']:.2%}"


@pytest.mark.parametrize(
    ("method", "told", "together"),
    [
        ("auto", "predicted error", 3),
        ("flap", "fluctuation", 2),
        ("cfsp", "lost energy", 2),
        ("wanda-sp", "lost score", 2),
        ("nirvana", "lost score", 2),
        ("replace", "predicted error", 2),
        ("shortgpt", "influence", 2),
    ],
)
def test_the_table_says_what_a_method_predicts_and_parts_blocks(
    run, model, given, method, told, together
):
    flags = ("--method", method, "--allocator", "least-error", "--keep", 0.5)
    shown = run("plan", model, *given, "--dry-run", *flags).succeeded().out.splitlines()
    assert shown[1].endswith(f"   {told} ")
    assert any(line.startswith(f"{told}: ") for line in shown)
    rows = [line.startswith(" layers") for line in shown[3:]]
    assert rows[: together + 1] == [True] * together + [False]
    assert max(map(len, shown)) <= 100


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("parameters", "of 18.43 k compressible parameters"),
        ("bytes", "of 73.73 kB of compressible weights"),
        ("flops", "of 36.86 k FLOPs per token"),
        ("cache", "of 256 B of KV cache per token"),
        ("latency", "of 0.02 ms for 1 × 16 tokens"),
    ],
)
def test_the_budget_is_shown_in_its_currency(run, model, given, machine, target, words):
    flags = ("--target", target, "--latency-length", 16, "--keep", 0.6)
    shown = run("plan", model, *given, "--dry-run", *flags).succeeded().out
    assert words in shown
    assert "(asked for 60.00%)" in shown
    assert max(map(len, shown.splitlines())) <= 100
