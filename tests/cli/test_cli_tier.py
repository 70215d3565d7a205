"""The tier that stock classes load, and the one that brings its code along."""

import json

import pytest
from conftest import ALLOCATORS, ROOT, numbers_on_disk, opened, sizes


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
    names = {path.name for path in (room / "out").glob("*.py")}
    assert names == {path.name for path in (ROOT / "secateur/layers").glob("*_secateur.py")}
    assert "modeling_secateur.py" in names


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
    """An option brings its allocator along, so the message is true of both."""
    asked = "knapsack" if flags[0] == "--cells" else flags[1]
    words = ["--tier plain", f"--allocator {asked}", "as far as given"]
    refused("--tier", "plain", *flags, words=words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--tier", "plain"), ["--tier plain keeps", "query_key, value_output"]),
        (
            ("--method", "flap", "--allocator", "middle", "--first", 1),
            ["--allocator middle --first 1.0 --last 0.0625 keeps", "(heads)", "other options"],
        ),
        (("--method", "cfsp"), ["the method or the model keeps", "another --method or --target"]),
    ],
    ids=lambda value: value[1],
)
def test_a_target_that_nothing_changes_names_what_keeps_it(refused, flags, words):
    given = ("--target", "cache", *flags)
    message = refused(*given, words=["out of reach", "changes the bytes of KV cache", *words])
    assert message.endswith("--target may.")


def test_a_budget_out_of_reach_names_what_keeps_units_whole(refused):
    flags = ("--method", "flap", "--allocator", "middle", "--first", 0.5, "--keep", 0.3)
    refused(*flags, words=["--allocator middle --first 0.5", "keeps 2 of 4 units whole"])


def test_the_tier_and_its_allocator_are_one(plan):
    flags = ("--keep", 0.7, "--allocator", "plain")
    by_allocator, both, by_tier = (
        plan(*own) for own in (flags, (*flags, "--tier", "plain"), (*flags[:2], "--tier", "plain"))
    )
    assert both == by_tier
    assert by_allocator | {"asked": both["asked"]} == both  # which says what was typed
    assert by_allocator["asked"] | {"tier": "plain"} == both["asked"]
