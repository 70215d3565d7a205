"""What a budget counts, who spends it, and what is measured once for all budgets."""

import json
import re

import pytest

COUNTED = {
    "parameters": "parameters",
    "bytes": "bytes",
    "flops": "flops_per_token",
    "cache": "cache_bytes_per_token",
}
PARAMETERS = 2 * (3 * 64 * 32 + 2 * 8 * 32 * 6)  # of what can shrink in the model of conftest
WHOLE = {
    "parameters": PARAMETERS,
    "bytes": 4 * PARAMETERS,
    "flops": 2 * PARAMETERS,
    "cache": 2 * 2 * (8 + 8) * 4,
}
ALLOCATORS = ("uniform", "influence", "knapsack", "fluctuation")
TIMES = {  # nanoseconds of a machine that tests can rely on; 2400 of them are fixed
    "nanoseconds": {
        "mlp": {0: 0, 64: 6400},
        "query_key": {0: 0, 8: 800},
        "value_output": {0: 0, 8: 1600},
    },
    "forward": 20_000,
}


@pytest.fixture
def given(text):
    return ["--calibration", text, "--samples", 4, "--length", 32]


@pytest.fixture
def plan(run, model, given):
    """The plan that a few flags lead to."""

    def made(*flags, source=None):
        shown = run("plan", source or model, *given, "--dry-run", "--json", *flags)
        return json.loads(shown.succeeded().out)

    return made


@pytest.fixture
def refused(run, model, given, room):
    """Hold the refusal of a plan against words; it leaves nothing."""

    def check(*flags, words=(), source=None):
        found = run("plan", source or model, *given, "-o", room / "p.json", *flags)
        found.refused(*words)
        assert list(room.iterdir()) == []
        return found.message[0]

    return check


@pytest.fixture
def replay(run, model, held, room, near):
    """Apply a plan, given as data, and return the record of the result."""

    def applied(content):
        (room / "plan.json").write_text(json.dumps(content))
        judge = ["--eval", held, "--no-speed", "--eval-windows", 2, "--new-tokens", 4]
        run("compress", model, room / "out", "--plan", room / "plan.json", *judge).succeeded()
        return json.loads((room / "out" / "secateur" / "report.json").read_text())

    return applied


@pytest.fixture
def idle(monkeypatch):
    """From the call on, calibrating or measuring fails the test."""
    from secateur import prepare

    def forbid():
        for name in ("calibrate", "score"):
            monkeypatch.setattr(
                prepare, name, lambda *_, name=name, **__: pytest.fail(f"did {name}")
            )

    return forbid


@pytest.fixture
def machine(monkeypatch, forget):
    """A machine of known times and an empty cache; the value lists what was measured on it."""
    from secateur import latency

    measured = []

    def times(model, goal, own):
        measured.append((goal.batch, goal.length))
        return latency.Table(of=own, **TIMES)

    forget()
    monkeypatch.setattr(latency, "_measure", times)
    return measured


def sizes(plan, kind=None):
    return {row["unit"]: row["after"] for row in plan["units"] if kind in (None, row["kind"])}


def numbers_on_disk(folder):
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors").values()
    return sum(t.numel() for t in tensors if t.is_floating_point())


def opened(folder):
    """The class that transformers opens a folder with, once every weight has found its place."""
    from transformers import AutoModelForCausalLM

    module, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return type(module)


# Defaults, targets, allocators


def test_the_defaults_are_auto_and_knapsack(run, model, given, room, monkeypatch):
    monkeypatch.chdir(room)
    run("plan", model, *given).succeeded()
    written = json.loads((room / "plan.json").read_text())
    assert written["version"] == 2
    assert written["method"]["name"] == "auto"
    assert written["method"]["options"]["keep"] == 0.8
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
    from secateur.cache import cached_file

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
    assert made["multiple_of"] == 24
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


# The tier that stock classes load


@pytest.mark.parametrize(
    ("flags", "kinds"), [(("auto",), 2), (("modegpt",), 2), (("flap", "--compensate", 0), 1)]
)
def test_the_plain_tier_is_one_width_and_stock_code(compress, room, flags, kinds):
    from transformers import LlamaForCausalLM

    compress("--tier", "plain", "--keep", 0.7, "--method", *flags).succeeded()
    written = json.loads((room / "out" / "secateur" / "plan.json").read_text())
    report = json.loads((room / "out" / "secateur" / "report.json").read_text())
    assert written["tier"] == report["tier"] == "plain"
    untouched = [row for row in written["units"] if row["kind"] != "mlp"]
    assert len(untouched) == 2 * kinds
    assert all(row["after"] == row["before"] for row in untouched)
    assert set(sizes(written, "mlp").values()) == {32}  # the largest eighth within the budget
    assert not list((room / "out").glob("*.py"))
    config = json.loads((room / "out" / "config.json").read_text())
    assert (config["model_type"], config["intermediate_size"]) == ("llama", 32)
    assert "auto_map" not in config
    assert opened(room / "out") is LlamaForCausalLM
    assert numbers_on_disk(room / "out") == report["compressed"]["parameters"]


@pytest.mark.parametrize("command", ["plan", "compress"])
def test_biases_that_stock_classes_have_no_place_for_are_refused(
    refused, compress, near, room, command
):
    flags, words = (
        ("--tier", "plain", "--keep", 0.7, "--method", "flap"),
        ["flap", "--compensate 0"],
    )
    if command == "plan":
        refused(*flags, words=words)
    else:
        compress(*flags).refused(*words)
        assert list(room.iterdir()) == []
    assert near == []


def test_the_other_tier_brings_its_code_along(compress, room):
    """What the test above would find if ``--tier`` did nothing."""
    compress("--keep", 0.7).succeeded()
    assert json.loads((room / "out/secateur/report.json").read_text())["tier"] == "per-layer"
    assert [path.name for path in (room / "out").glob("*.py")] == ["modeling_secateur.py"]


def test_a_plan_of_the_plain_tier_is_replayed(plan, replay, compress, room):
    made = plan("--tier", "plain", "--keep", 0.7)
    assert replay(made)["tier"] == "plain"
    compress("--tier", "plain", "--keep", 0.7, out=room / "again").succeeded()
    weights = [(room / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    "flags", [*(("--allocator", name) for name in ALLOCATORS), ("--cells", "200")], ids=" ".join
)
def test_the_plain_tier_leaves_nothing_to_allocate(refused, flags):
    asked = "knapsack" if flags[0] == "--cells" else flags[1]
    refused("--tier", "plain", *flags, words=["tier plain", f"'{asked}'"])


def test_the_tier_and_its_allocator_are_one(plan):
    flags = ("--keep", 0.7, "--allocator", "plain")
    assert plan(*flags) == plan(*flags, "--tier", "plain") == plan(*flags[:2], "--tier", "plain")


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


# What was measured serves again


def test_a_second_budget_measures_nothing(plan, forget, idle):
    forget()
    first = plan("--keep", 0.7)
    idle()
    assert plan("--keep", 0.7) == first
    second = plan("--keep", 0.4)
    assert second["budget"]["reached"] <= 0.4
    losses = (sum(row["predicted_loss"] for row in found["units"]) for found in (first, second))
    assert next(losses) < next(losses)
    for flags in (("--target", "cache"), ("--multiple-of", 16), ("--allocator", "uniform")):
        plan(*flags)
    with pytest.raises(pytest.fail.Exception, match="did calibrate"):
        plan("--seed", 1)


def test_a_budget_after_a_run_measures_nothing(plan, compress, forget, idle, near):
    forget()
    compress("--keep", 0.7).succeeded()
    idle()
    plan("--keep", 0.4)


def test_a_run_after_a_plan_scores_nothing(plan, compress, forget, monkeypatch, room):
    from secateur import prepare

    forget()
    planned = plan("--keep", 0.7)
    monkeypatch.setattr(prepare, "score", lambda *_: pytest.fail("scored again"))
    compress("--keep", 0.7).succeeded()
    assert json.loads((room / "out" / "secateur" / "plan.json").read_text()) == planned


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null"])
def test_damaged_scores_of_the_cache_are_measured_again(plan, forget, content):
    from secateur.cache import cached_file

    forget()
    first = plan()
    (path,) = cached_file("scores", {}).parent.glob("*.json")
    whole = path.read_text()
    path.write_text(content)
    assert plan() == first
    assert path.read_text() == whole


def test_a_cache_that_can_not_be_written_is_done_without(
    run, model, given, plan, machine, monkeypatch, tmp_path
):
    flags = ("--target", "latency", "--latency-length", 16)
    first = plan(*flags)
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="nothing was kept") as noted:
        assert plan(*flags) == first
    assert len(noted) == 2  # neither scores nor times
    assert (tmp_path / "file").read_text() == "mine"


def test_scores_are_written_and_read_again(plan, forget, idle, tmp_path):
    path = tmp_path / "scores.json"
    first = plan("--scores", path)
    written = path.read_bytes()
    assert json.loads(written)["model"] == first["base"]["fingerprint"]
    forget()
    idle()
    assert plan("--scores", path) == first
    assert plan("--scores", path, "--keep", 0.4)["budget"]["reached"] <= 0.4
    assert path.read_bytes() == written
    with pytest.raises(pytest.fail.Exception, match="did calibrate"):
        plan()  # the file is not the cache


def test_a_run_reads_scores_and_writes_them(plan, compress, forget, idle, tmp_path, room, near):
    path = tmp_path / "scores.json"
    forget()
    compress("--scores", path).succeeded()
    idle()
    made = plan("--scores", path)
    assert json.loads((room / "out" / "secateur" / "plan.json").read_text()) == made


@pytest.fixture
def scores(plan, tmp_path):
    path = tmp_path / "scores.json"
    plan("--scores", path)
    return path


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (("--seed", 1), "calibration is"),
        (("--samples", 3), "calibration is"),
        (("--ridge", 0.5), "'ridge': 0.5"),
        (("--iterations", 1), "'iterations': 1"),
        (("--method", "modegpt"), "method is 'auto' there and 'modegpt' here"),
    ],
    ids=str,
)
def test_scores_of_something_else_are_refused(refused, scores, flags, field):
    written = scores.read_bytes()
    refused("--scores", scores, *flags, words=["scores.json", "something else", field])
    assert scores.read_bytes() == written


def test_scores_of_another_text_are_refused(refused, scores, held):
    refused("--scores", scores, "--calibration", held, words=["something else", "calibration is"])


def test_scores_of_another_model_are_refused(refused, scores, tmp_path, llama_config, tokenizer):
    from conftest import save_checkpoint

    other = save_checkpoint(tmp_path / "other", llama_config(), tokenizer, seed=1)
    refused("--scores", scores, source=other, words=["something else", "model is"])


def test_scores_of_another_number_format_do_not_serve(plan, forget, tmp_path, model):
    """Weights in bfloat16 are the same weights in every format that computes with them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(model, dtype="bfloat16").save_pretrained(half)
    AutoTokenizer.from_pretrained(model).save_pretrained(half)
    forget()
    first = plan("--dtype", "float32", source=half)
    forget()
    assert plan("--dtype", "bfloat16", source=half)["units"] != first["units"]
    assert plan("--dtype", "float32", source=half) == first


def test_scores_without_losses_are_refused_where_losses_are_needed(plan, refused, forget, tmp_path):
    path = tmp_path / "scores.json"
    forget()
    made = plan("--allocator", "uniform", "--scores", path)
    assert {row["predicted_loss"] for row in made["units"]} == {None}
    refused("--scores", path, words=["something else", "measured is False"])


def test_scores_with_losses_serve_who_needs_none(plan, scores, forget, idle):
    forget()
    idle()
    assert plan("--allocator", "uniform", "--scores", scores)["allocator"]["name"] == "uniform"


def dropped(field, unit):
    return lambda content: content[field].pop(unit)


def cut(field, unit):
    return lambda content: content[field].update({unit: content[field][unit][:-1]})


@pytest.mark.parametrize(
    ("change", "allocator"),
    [
        (dropped("curves", "layers.1.mlp"), "knapsack"),
        (dropped("curves", "layers.1.mlp"), "uniform"),
        (dropped("losses", "layers.0.query_key"), "knapsack"),
        (cut("curves", "layers.0.value_output"), "knapsack"),
        (cut("losses", "layers.0.mlp"), "knapsack"),
        (lambda content: content.update(losses=None), "knapsack"),
        (lambda content: content.update(readings=[[0.5]]), "influence"),
        (lambda content: content.update(version=1), "knapsack"),
        (lambda content: content.update(more=1), "knapsack"),
        (lambda content: content.pop("readings"), "knapsack"),
    ],
    ids=[
        "no curve",
        "no curve, no losses needed",
        "no loss",
        "short curve",
        "short loss",
        "no losses",
        "too few blocks",
        "earlier version",
        "more",
        "less",
    ],
)
def test_damaged_scores_are_refused(refused, scores, change, allocator):
    content = json.loads(scores.read_text())
    change(content)
    scores.write_text(json.dumps(content))
    refused("--scores", scores, "--allocator", allocator, words=["scores.json"])


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\x00", b'{"version": 1}'])
def test_rubbish_for_scores_is_refused(refused, tmp_path, content):
    path = tmp_path / "rubbish.json"
    path.write_bytes(content)
    refused("--scores", path, words=["rubbish.json"])
    assert path.read_bytes() == content


@pytest.mark.parametrize("command", ["plan", "compress"])
@pytest.mark.parametrize("place", ["nowhere/s.json", "file/s.json", "folder"])
def test_scores_that_have_no_place_are_refused(
    refused, compress, near, room, idle, tmp_path, command, place
):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    idle()
    if command == "plan":
        refused("--scores", tmp_path / place, words=["--scores", str(tmp_path / place)])
    else:
        compress("--scores", tmp_path / place).refused("--scores", str(tmp_path / place))
    assert list(room.iterdir()) == []


@pytest.fixture
def statistics(plan, forget, tmp_path):
    """A folder that one run left; no scores are."""
    forget()
    plan("--statistics", tmp_path / "statistics")
    forget()
    return tmp_path / "statistics"


def test_statistics_serve_another_option_of_the_method(plan, statistics, monkeypatch):
    from secateur import prepare

    monkeypatch.setattr(prepare, "calibrate", lambda *_: pytest.fail("calibrated again"))
    made = plan("--statistics", statistics, "--ridge", 0.5)
    assert made["method"]["options"]["ridge"] == 0.5
    with pytest.raises(pytest.fail.Exception):
        plan("--ridge", 0.6)


@pytest.mark.parametrize(
    ("flags", "field"),
    [(("--seed", 1), "calibration is"), (("--method", "modegpt"), "needs is")],
    ids=str,
)
def test_statistics_of_something_else_are_refused(refused, statistics, flags, field):
    refused("--statistics", statistics, *flags, words=["statistics", "something else", field])


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_rubbish_among_statistics_is_refused(refused, statistics, content):
    (statistics / "identity.json").write_text(content)
    refused("--statistics", statistics, words=["statistics"])


# What a plan shows


def table(shown):
    """Unit to (before, after, bytes, prediction), as the table has them."""
    row = re.compile(
        r"^ (layers\S+) +(\d+) → (\d+|gone) +(\d+)% +(\S+ k?B) +(\S+) *$", re.MULTILINE
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
        assert (int(before), after) == (row["before"], str(row["after"] or "gone"))
        assert int(kept) == round(100 * row["after"] / row["before"])
        number, prefix = re.fullmatch(r"(\S+) (k?)B", stored).groups()
        assert float(number) * (1000 if prefix else 1) == pytest.approx(row["bytes"], abs=5)
        assert loss == f"{row['predicted_loss']:.5f}"
    total = sum(row["predicted_loss"] for row in made["units"])
    assert f"{total:.4f} in all" in shown.replace("\n", " ")
    assert ("gone" in shown) == (0 in sizes(made).values()) == (keep == 0.3)


def test_the_table_shows_errors_where_no_loss_was_measured(run, model, given, plan, forget):
    forget()
    flags = ("--allocator", "uniform")
    shown = run("plan", model, *given, "--dry-run", *flags).succeeded().out
    assert "predicted error" in shown.splitlines()[1]
    assert "predicted loss" not in shown
    for row in plan(*flags)["units"]:
        assert table(shown)[row["unit"]][-1] == f"{row['predicted_error']:.2%}"


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("parameters", "of 18.43 k compressible parameters"),
        ("bytes", "of 73.73 kB that can shrink"),
        ("flops", "of 36.86 k operations a token"),
        ("cache", "of 256 B of KV cache a token"),
        ("latency", "of 0.02 ms for 1 × 16 tokens"),
    ],
)
def test_the_budget_is_shown_in_its_currency(run, model, given, machine, target, words):
    flags = ("--target", target, "--latency-length", 16, "--keep", 0.6)
    shown = run("plan", model, *given, "--dry-run", *flags).succeeded().out
    assert words in shown
    assert "(asked for 60.00%)" in shown
    assert max(map(len, shown.splitlines())) <= 100


# Units that go altogether


def test_a_plan_with_units_gone_is_replayed(plan, replay, model, room):
    made = plan("--keep", 0.3)
    assert 0 in sizes(made).values()
    report = replay(made)
    assert report["budget"] == made["budget"]
    assert json.loads((room / "out" / "secateur" / "plan.json").read_text()) == made
    kept = sum(row["parameters"] for row in made["units"])
    assert numbers_on_disk(room / "out") == numbers_on_disk(model) - PARAMETERS + kept


EVERYTHING = ("mlp", "query_key", "value_output")


@pytest.mark.parametrize(
    ("target", "kinds", "block"),
    [
        ("parameters", EVERYTHING, ""),
        ("parameters", EVERYTHING, "layers.0"),
        ("parameters", ("mlp",), ""),
        ("parameters", ("query_key",), ""),
        ("parameters", ("query_key", "value_output"), ""),
        ("cache", EVERYTHING, ""),
        ("cache", ("query_key", "value_output"), "layers.1"),
    ],
    ids=str,
)
def test_units_that_are_edited_away_are_gone(plan, replay, model, room, target, kinds, block):
    made = plan("--target", target)
    for row in made["units"]:
        gone = row["kind"] in kinds and row["unit"].startswith(block)
        row["after"] = 0 if gone else row["before"]
    report = replay(made)
    written = json.loads((room / "out" / "secateur" / "plan.json").read_text())
    assert sizes(written) == sizes(made)
    kept = sum(row[COUNTED[target]] for row in written["units"])
    assert report["budget"]["reached"] == kept / WHOLE[target]
    disk = numbers_on_disk(model) - PARAMETERS + sum(row["parameters"] for row in written["units"])
    assert numbers_on_disk(room / "out") == report["compressed"]["parameters"] == disk
    assert report["tier"] == "per-layer"  # stock classes have no MLP without channels either
    assert opened(room / "out").__module__.endswith("modeling_secateur")


@pytest.mark.parametrize("values", ["layers.0.value_output", "layers.1.value_output"])
def test_queries_without_values_are_refused(run, model, plan, room, near, values):
    made = plan("--keep", 1)
    for row in made["units"]:
        row["after"] = 0 if row["unit"] == values else row["before"]
    (room / "plan.json").write_text(json.dumps(made))
    shown = run("compress", model, room / "out", "--plan", room / "plan.json", "--no-speed")
    shown.refused(values, values.replace("value_output", "query_key"), "nearest is 0")
    assert [path.name for path in room.iterdir()] == ["plan.json"]
    assert near == []


def test_a_latency_plan_is_replayed(plan, replay, machine):
    made = plan("--target", "latency", "--latency-length", 16, "--latency-batch", 2, "--keep", 0.6)
    report = replay(made)
    assert report["budget"] == made["budget"]
    assert machine == [(2, 16)]
