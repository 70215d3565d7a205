"""Runs beside one another: who is dominated, and what can't be compared."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur import InputError
from secateur.report.frontier_table import AXES, _beats, compare
from tests.support.made_runs import first_version, made_run, report


def judged(perplexity, size, decode=100.0, prefill=1000.0):
    speed = {
        "prefill_tokens_per_second": prefill,
        "decode_tokens_per_second": decode,
        "prompt_tokens": 50,
    }
    small = {"perplexity": {"held.txt": perplexity}, "bytes": size, "speed": speed}
    return report(compressed=small)


@pytest.fixture
def runs(tmp_path):
    def made(**reports):
        return [made_run(tmp_path / name, content) for name, content in reports.items()]

    return made


def test_what_is_as_good_on_one_and_better_on_the_other_count_dominates(runs):
    """The mistake: only what is better on both counts dominates."""
    found = compare(
        runs(
            a=judged(12.0, 3000),
            same_quality=judged(12.0, 3100),
            same_size=judged(12.5, 3000),
            smaller=judged(13.0, 2900),
            worse_than_dense=judged(11.0, 4100),
        )
    )
    best = {entry["name"]: entry["frontier"]["bytes"] for entry in found["runs"]}
    assert best == {
        "a": True,
        "same_quality": False,
        "same_size": False,
        "smaller": True,
        "worse_than_dense": False,
    }
    assert found["dense"]["frontier"]["bytes"]


def test_two_equal_runs_are_both_on_the_frontier(runs):
    found = compare(runs(a=judged(12.0, 3000), b=judged(12.0, 3000)))
    assert all(entry["frontier"]["bytes"] for entry in found["runs"])


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=12))
def test_the_frontier_holds_something_below_every_run(points):
    entries = [{"perplexity": y, "bytes": x} for x, y in points]
    best = [e for e in entries if not any(_beats(other, e, "bytes") for other in entries)]
    for entry in entries:
        assert any(
            b["bytes"] <= entry["bytes"] and b["perplexity"] <= entry["perplexity"] for b in best
        )
    for a in best:
        assert not any(
            b["bytes"] < a["bytes"] and b["perplexity"] < a["perplexity"] for b in entries
        )


def test_times_are_of_a_prompt_and_of_a_token(runs):
    found = compare(runs(a=judged(12.0, 3000, decode=200.0, prefill=500.0)))
    assert found["runs"][0]["prefill_ms"] == pytest.approx(100.0)
    assert found["runs"][0]["decode_ms"] == pytest.approx(5.0)
    images = judged(12.0, 3000, prefill=500.0)
    for side in ("dense", "compressed"):
        images[side]["counts"] = "images"
    assert compare(runs(b=images))["runs"][0]["prefill_ms"] == pytest.approx(2.0)


def test_a_run_that_was_not_timed_is_on_no_frontier_of_time(runs):
    untimed = judged(12.0, 3000)
    untimed["dense"]["speed"] = untimed["compressed"]["speed"] = {}
    found = compare(runs(a=judged(12.0, 3000), b=untimed))
    assert set(found["runs"][1]["frontier"]) == {"bytes"}
    assert set(found["runs"][0]["frontier"]) == set(AXES)
    assert any("not timed" in note for note in found["notes"])


def test_times_of_a_busier_machine_are_noted(runs):
    slow = judged(12.0, 3000)
    slow["dense"]["speed"] = slow["dense"]["speed"] | {"decode_tokens_per_second": 50.0}
    (note,) = compare(runs(a=judged(12.0, 3000), b=slow))["notes"]
    assert "decode: the dense model was" in note
    assert "2.00 times" in note


def test_runs_of_other_dense_models_are_refused(runs):
    other = report(model={"source": "other/model", "model_type": "llama", "fingerprint": "e" * 16})
    with pytest.raises(InputError, match=r"some/model.*other/model"):
        compare(runs(a=report(), b=other))


def test_runs_judged_on_other_tokens_are_refused(runs):
    """The mistake: texts of one name taken for the same."""
    sides = {"texts": {"held.txt": "bb"}}
    with pytest.raises(InputError, match=r"'held\.txt' the second has other tokens"):
        compare(runs(a=report(), b=report(dense=sides, compressed=sides)))


def test_runs_judged_on_other_texts_are_refused_by_name(runs):
    sides = {"perplexity": {"x.txt": 3.0}, "tokens": {"x.txt": 9}, "texts": {"x.txt": "aa"}}
    with pytest.raises(InputError, match=r"'held\.txt' the second has 'x\.txt'"):
        compare(runs(a=report(), b=report(dense=sides, compressed=sides)))


def test_the_first_common_text_counts_and_others_are_named(runs):
    both = {
        "perplexity": {"x.txt": 3.0, "held.txt": 10.0},
        "tokens": {"x.txt": 9, "held.txt": 640},
        "texts": {"x.txt": "cc", "held.txt": "aa"},
    }
    found = compare(runs(a=report(dense=both, compressed=both), b=report()))
    assert found["text"] == "held.txt"
    assert found["notes"] == ["'x.txt' is not compared: not all runs were evaluated on it"]
    assert found["runs"][0]["top1_agreement"] is None  # which is of the other text


def test_reports_without_fingerprints_go_by_what_the_dense_model_says(runs):
    old = first_version()
    assert compare(runs(a=report(), b=old))["text"] == "held.txt"
    old["dense"]["perplexity"] = {"held.txt": 10.2}
    with pytest.raises(InputError, match="other tokens"):
        compare(runs(c=report(), d=old))


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [made_run(tmp_path / place / "out", report()) for place in ("a", "b")]
    found = compare(folders)
    assert [entry["name"] for entry in found["runs"]] == ["a/out", "b/out"]
    with pytest.raises(InputError, match="twice"):
        compare([folders[0], folders[0]])


BROKEN = {
    "no report": (lambda path: path.unlink(), "report.json"),
    "no JSON": (lambda path: path.write_text("{"), "report.json"),
    "a list": (lambda path: path.write_text("[]"), "report.json"),
    "a later version": (lambda path: path.write_text(json.dumps(report(version=99))), "upgrade"),
    "no perplexity": (lambda path: path.write_text('{"version": 2}'), "model"),
    "not a number": (
        lambda path: path.write_text(json.dumps(report(dense={"bytes": "many"}))),
        "dense.bytes",
    ),
    "not finite": (
        lambda path: path.write_text(json.dumps(report(dense={"perplexity": {"a": float("nan")}}))),
        "perplexity",
    ),
    "one side": (
        lambda path: path.write_text(json.dumps(report(dense={"perplexity": {"b": 2.0}}))),
        "only one",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_what_is_no_run_is_refused(tmp_path, how):
    folder, (damage, word) = made_run(tmp_path / "out"), BROKEN[how]
    damage(folder / "secateur" / "report.json")
    with pytest.raises(InputError, match=word):
        compare([folder])


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        compare([tmp_path / "nothing"])
