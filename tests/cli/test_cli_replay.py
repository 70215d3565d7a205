"""Plans that are applied again, edited, damaged, or for something else."""

import json
import os

import pytest
from conftest import report_of


@pytest.fixture
def plan_file(finished, tmp_path):
    """A function that writes a changed copy of the plan of :func:`finished`."""

    def write(change):
        plan = json.loads((finished[0] / "secateur" / "plan.json").read_text())
        plan["selection"] = None  # its file stays where it is
        change(plan)
        path = tmp_path / "changed.json"
        path.write_text(json.dumps(plan))
        return path

    return write


@pytest.fixture
def replay(run, model, held, room, near):
    def command(plan, *args, source=None):
        judge = ["--eval", held, "--no-speed", "--eval-windows", 2, "--new-tokens", 4]
        return run("compress", source or model, room / "out", "--plan", plan, *judge, *args)

    return command


def set_size(unit, size):
    def change(plan):
        row = next(row for row in plan["units"] if row["unit"] == unit)
        row["after"] = size

    return change


def test_an_edited_plan_is_followed(replay, plan_file, room):
    from safetensors.torch import load_file

    replay(plan_file(set_size("layers.0.mlp", 24))).succeeded()
    tensors = load_file(room / "out" / "model.safetensors")
    assert tensors["model.layers.0.mlp.gate_proj.weight"].shape == (24, 32)
    assert tensors["model.layers.0.mlp.down_proj.weight"].shape == (32, 24)
    written = json.loads((room / "out" / "secateur" / "plan.json").read_text())
    row = next(row for row in written["units"] if row["unit"] == "layers.0.mlp")
    assert row["parameters"] == 24 * 32 * 3
    kept = sum(row["parameters"] for row in written["units"])
    assert report_of(room / "out")["budget"]["reached"] == kept / written["budget"]["total"]


def test_a_plan_for_a_runtime_that_its_shapes_are_not_for_is_refused(replay, plan_file, room):
    """The mistake: a runtime written into a plan by hand, and believed."""
    replay(plan_file(lambda plan: plan["asked"].update(runtime="vllm"))).refused("vllm", "plain")
    assert not (room / "out").exists()


def drop_unit(plan):
    plan["units"].pop()


def name_twice(plan):
    plan["units"].append(plan["units"][0])


def rename_unit(plan):
    plan["units"][0]["unit"] = "layers.9.mlp"


def unknown_unit(plan):
    plan["units"].append(plan["units"][0] | {"unit": "layers.9.mlp"})


def unknown_method(plan):
    plan["method"]["name"] = "modegtp"


def unknown_option(plan):
    plan["method"]["options"]["rigde"] = 0.1


def text_for_a_number(plan):
    plan["method"]["options"]["ridge"] = "hot"


def unknown_allocator(plan):
    plan["allocator"]["name"] = "knapsak"


def unknown_allocator_option(plan):
    plan["allocator"]["options"]["cels"] = 200


def text_for_an_allocator_number(plan):
    plan["allocator"]["options"]["cells"] = "many"


def unknown_target(plan):
    plan["budget"]["of"] = "latncy"


def no_batch(plan):
    plan["budget"]["batch"] = 0


def unknown_field(plan):
    plan["unit"] = []


def earlier_version(plan):
    plan["version"] = 1


def later_version(plan):
    plan["version"] = 4


def no_text(plan):
    plan["calibration"]["source"] = "/no/such/text.txt"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_size("layers.0.mlp", 25), ["layers.0.mlp", "25", "nearest is 24"]),
        (set_size("layers.0.query_key", 3), ["layers.0.query_key", "3"]),
        (set_size("layers.1.mlp", 72), ["layers.1.mlp", "72", "64"]),
        (set_size("layers.1.mlp", -1), ["units.3.after", "0"]),
        (set_size("layers.1.mlp", "all"), ["after"]),
        (drop_unit, ["no row", "layers.1.value_output"]),
        (name_twice, ["several rows", "layers.0.mlp"]),
        (rename_unit, ["no unit 'layers.9.mlp'", "did you mean 'layers.0.mlp'"]),
        (unknown_unit, ["no unit 'layers.9.mlp'", "remove"]),
        (unknown_method, ["modegtp", "did you mean 'modegpt'"]),
        (unknown_option, ["rigde", "did you mean 'ridge'"]),
        (text_for_a_number, ["ridge", "hot"]),
        (unknown_allocator, ["knapsak", "did you mean 'knapsack'"]),
        (unknown_allocator_option, ["cels", "did you mean 'cells'"]),
        (text_for_an_allocator_number, ["cells", "many"]),
        (unknown_target, ["budget.of", "latency"]),
        (no_batch, ["budget.batch"]),
        (unknown_field, ["unit"]),
        (earlier_version, ["version"]),
        (later_version, ["version"]),
        (no_text, ["/no/such/text.txt"]),
    ],
)
def test_a_wrong_plan_is_refused(replay, plan_file, room, change, words):
    replay(plan_file(change)).refused(*words)
    assert list(room.iterdir()) == []


def test_a_plan_for_another_model_is_refused(
    replay, plan_file, room, tmp_path, llama_config, tokenizer
):
    from conftest import save_checkpoint

    other = save_checkpoint(tmp_path / "other", llama_config(), tokenizer, seed=1)
    replay(plan_file(lambda _: None), source=other).refused("another model", "secateur plan")
    assert list(room.iterdir()) == []


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b'{"version": 1}', b"[" * 100_000]
)
def test_a_file_that_is_no_plan_is_refused(replay, tmp_path, room, content):
    (tmp_path / "plan.json").write_bytes(content)
    replay(tmp_path / "plan.json").refused("plan.json")
    assert list(room.iterdir()) == []


def test_a_huge_plan_is_refused_unread(replay, tmp_path, room):
    with (tmp_path / "plan.json").open("wb") as file:
        os.truncate(file.fileno(), 2**33)  # sparse
    replay(tmp_path / "plan.json").refused("plan.json", "larger")
    assert list(room.iterdir()) == []


def test_a_missing_plan_is_refused(replay, tmp_path, room):
    replay(tmp_path / "nowhere.json").refused("nowhere.json", "no such file")
    replay(tmp_path).refused(str(tmp_path))
    assert list(room.iterdir()) == []


@pytest.mark.parametrize(
    "flags",
    [
        ("--keep", 0.5),
        ("--method", "modegpt"),
        ("--calibration", "bundled"),
        ("--samples", 3),
        ("--length", 32),
        ("--seed", 1),
        ("--multiple-of", 8),
        ("--ridge", 0.1),
        ("--iterations", 1),
        ("--cells", 200),
        ("--target", "parameters"),
        ("--tier", "per-layer"),
        ("--allocator", "knapsack"),
        ("--latency-batch", 1),
        ("--latency-length", 256),
    ],
    ids=str,
)
def test_a_flag_that_a_plan_already_answers_is_refused(replay, plan_file, room, flags):
    replay(plan_file(lambda _: None), *flags).refused(flags[0], "--plan", "exclude")
    assert list(room.iterdir()) == []
