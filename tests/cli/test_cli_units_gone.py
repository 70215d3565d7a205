"""Plans in which units go altogether."""

import json

import pytest
from conftest import COUNTED, PARAMETERS, WHOLE, numbers_on_disk, opened, sizes


def test_a_plan_with_units_gone_is_replayed(plan, replay, model, room):
    made = plan("--keep", 0.3)
    assert 0 in sizes(made).values()
    report = replay(made)
    assert report["budget"] == made["budget"]
    written = json.loads((room / "out" / "secateur" / "plan.json").read_text())
    assert written | {"selection": None} == made
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
