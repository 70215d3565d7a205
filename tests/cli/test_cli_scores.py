"""Scores and statistics: measured once for all budgets, kept, refused where they are of others."""

import json

import pytest


@pytest.fixture
def idle(monkeypatch):
    """From the call on, calibrating or measuring fails the test."""
    from secateur.pipeline import prepare

    def forbid():
        for name in ("calibrate", "score"):
            monkeypatch.setattr(
                prepare, name, lambda *_, name=name, **__: pytest.fail(f"did {name}")
            )

    return forbid


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
    from secateur.pipeline import prepare

    forget()
    planned = plan("--keep", 0.7)
    monkeypatch.setattr(prepare, "score", lambda *_, **__: pytest.fail("scored again"))
    compress("--keep", 0.7).succeeded()
    written = json.loads((room / "out" / "secateur" / "plan.json").read_text())
    assert written | {"selection": None} == planned


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null"])
def test_damaged_scores_of_the_cache_are_measured_again(plan, forget, content):
    from secateur.io.cache import cached_file

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
    written = json.loads((room / "out" / "secateur" / "plan.json").read_text())
    assert written | {"selection": None} == made


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
    from secateur.pipeline import prepare

    monkeypatch.setattr(prepare, "calibrate", lambda *_, **__: pytest.fail("calibrated again"))
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
