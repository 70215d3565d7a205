"""Several methods one after the other, under one budget."""

import json

import pytest
import yaml

STEPS = [
    {"method": "modegpt", "multiple_of": 2},
    {"method": "svd-llm", "options": {"rank_step": 1}, "keep": 0.85},
]
SMALL = ["--no-speed", "--samples", 4, "--length", 32, "--eval-windows", 2, "--new-tokens", 4]


@pytest.fixture
def follow(run, near, model, text, held, room):
    """Compress by a recipe that is given as data."""

    def command(content, *flags, source=None):
        file = room.parent / "recipe.yaml"
        file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        given = ["--recipe", file, "--calibration", text, "--eval", held, *SMALL]
        return run("compress", source or model, room / "out", *given, *flags)

    return command


def record(room):
    return json.loads((room / "out" / "secateur" / "report.json").read_text())


def stored(folder):
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    return sum(t.numel() * t.element_size() for n, t in tensors.items() if ".layers." in n)


@pytest.mark.parametrize("keep", [0.5, 0.7])
def test_one_budget_of_bytes_holds_for_all_steps(follow, room, model, keep):
    follow({"keep": keep, "steps": STEPS}).succeeded()
    report = record(room)
    share = stored(room / "out") / stored(model)
    assert report["budget"]["reached"] == pytest.approx(share)
    assert keep - 0.04 < share <= keep
    assert [step["method"]["name"] for step in report["steps"]] == ["modegpt", "svd-llm"]
    assert report["tier"] == "factored"
    assert not list((room / "out").glob("shard*"))  # nothing that only going on would need


def test_statistics_are_those_of_what_the_step_before_has_left(follow, room):
    follow({"keep": 0.6, "steps": STEPS}).succeeded()
    plans = [json.loads(p.read_text()) for p in sorted((room / "out/secateur").glob("plan-*"))]
    assert plans[0]["base"]["fingerprint"] != plans[1]["base"]["fingerprint"]
    sizes = {row["unit"]: row["after"] for row in plans[0]["units"]}
    for row in plans[1]["units"]:
        if row["unit"].endswith("up_proj") and row["form"]:
            block = row["unit"].split(".")[1]
            assert row["form"]["outputs"] == sizes[f"layers.{block}.mlp"]


def test_the_record_of_a_run_is_a_recipe(follow, compress, room, model):
    """What a run with one method leaves can be followed again, too."""
    compress("--method", "modegpt", "--keep", "0.8").succeeded()
    first = (room / "out" / "model.safetensors").read_bytes()
    follow((room / "out/secateur/recipe.yaml").read_text(), "--overwrite").succeeded()
    assert (room / "out" / "model.safetensors").read_bytes() == first


def test_a_keep_at_the_command_line_is_the_budget(follow, room):
    follow({"keep": 0.9, "steps": STEPS}, "--keep", "0.6").succeeded()
    assert record(room)["budget"]["keep"] == 0.6


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("steps: []", ["at least one step"]),
        ("keep: 2\nsteps: [{method: svd}]", ["keep"]),
        ("steps: [{method: modegpt}]", ["how much", "--keep"]),
        ("keep: 0.5\nsteps: [{method: modegpt}, {method: flap}]", ["all but one"]),
        ("steps: [{method: modgpt, keep: 0.5}]", ["modegpt"]),
        ("steps: [{method: svd, keep: 0.5, options: {rank: 2}}]", ["rank_step"]),
        ("steps: [{method: svd, keep: 0.5, alloc: uniform}]", ["alloc", "docs/recipes.md"]),
        ("steps: [{method: svd, keep: 0.5, allocator_options: {cells: 3}}]", ["allocator"]),
        ("steps: {", ["no YAML"]),
        ("- 1", ["recipe"]),
        ("keep: 0.9\nsteps: [{method: modegpt}, {method: svd, keep: 0.5}]", ["nothing to do"]),
        ("keep: 0.5\nsteps: [{method: svd, keep: 0.8}, {method: modegpt}]", ["compressed"]),
        ("steps: [{method: svd}, {method: flap, keep: 0.8}]", ["flap prunes", "before"]),
    ],
)
def test_bad_recipes_are_refused_and_leave_nothing(follow, room, content, words):
    follow(content).refused(*words)
    assert list(room.iterdir()) == []


def test_keeps_that_leave_more_than_the_budget_are_refused(follow, room):
    """And nothing is said of going on, as no step could give more."""
    steps = [step | {"keep": 0.95} for step in STEPS]
    found = follow({"keep": 0.5, "steps": steps})
    found.refused("leave one of them out")
    assert "narrowing further" not in found.err
    assert list(room.iterdir()) == []


def test_flags_of_a_method_are_refused_beside_a_recipe(follow, room, model):
    recipe = {"keep": 0.6, "steps": STEPS}
    for flags in (["--method", "flap"], ["--target", "bytes"], ["--multiple-of", "4"]):
        follow(recipe, *flags).refused(flags[0], "--recipe")


def test_a_killed_run_goes_on_behind_its_last_step(follow, room, monkeypatch):
    from secateur.pipeline import compress_stage

    recipe, seen = {"keep": 0.6, "steps": STEPS}, []
    prepare = compress_stage.prepare

    def once(inputs, step, *rest, **named):
        seen.append(step.method.name)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return prepare(inputs, step, *rest, **named)

    monkeypatch.setattr(compress_stage, "prepare", once)
    assert follow(recipe).code == 130
    follow(recipe).succeeded()
    assert seen == ["modegpt", "svd-llm", "svd-llm"]
    interrupted = (room / "out" / "model.safetensors").read_bytes()
    follow(recipe, "--overwrite").succeeded()
    assert (room / "out" / "model.safetensors").read_bytes() == interrupted


@pytest.fixture
def attempts(monkeypatch):
    """Let every result but the third be above the budget; the value lists all keeps."""
    from secateur.pipeline import compress_stage
    from secateur.pipeline import multi_step as sequence

    keeps, prepare, stored_bytes = [], compress_stage.prepare, sequence.stored_bytes

    def noted(inputs, step, *rest, **named):
        keeps.append((step.method.name, step.budget.keep))
        return prepare(inputs, step, *rest, **named)

    def above(folder, shapes):
        found = stored_bytes(folder, shapes)
        firsts = {keep for name, keep in keeps if name == "modegpt"}
        if folder.name != "result" or len(firsts) == 3:
            return found
        return int((1 + len(firsts) / 10) * found)

    monkeypatch.setattr(compress_stage, "prepare", noted)
    monkeypatch.setattr(sequence, "stored_bytes", above)
    return keeps


@pytest.mark.parametrize("damaged", [(), ("attempt.json",), ("step-1/plan.json",)])
def test_a_run_killed_in_its_second_attempt_goes_on_with_that(
    follow, room, monkeypatch, attempts, damaged
):
    """The mistake: the budget of the first attempt beside the steps of the second."""
    from secateur.pipeline import compress_stage

    follow({"keep": 0.6, "steps": STEPS}).succeeded()
    expected, keeps = (room / "out" / "model.safetensors").read_bytes(), [*attempts]
    assert len(keeps) == 6
    attempts.clear()
    prepare = compress_stage.prepare

    def killed(*given, **named):
        if len(attempts) == 3:
            raise KeyboardInterrupt
        return prepare(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(compress_stage, "prepare", killed)
        assert follow({"keep": 0.6, "steps": STEPS}, "--overwrite").code == 130
    for name in damaged:
        path = room / ".out.partial" / name
        path.write_text(path.read_text()[:-9])
    follow({"keep": 0.6, "steps": STEPS}, "--overwrite").succeeded()
    assert (room / "out" / "model.safetensors").read_bytes() == expected
    if not damaged:
        assert attempts == keeps


def test_a_missing_library_is_said_before_the_first_step(follow, room, monkeypatch):
    from secateur.layers import integers
    from secateur.pipeline import compress_stage

    monkeypatch.setattr(integers, "find_spec", lambda _: None)
    monkeypatch.setattr(compress_stage, "prepare", None)  # is never reached
    follow({"keep": 0.4, "steps": [{"method": "modegpt"}, {"method": "rtn"}]}).refused(
        "pip install"
    )


def test_steps_that_are_done_again_are_forgotten_from_the_last_on(tmp_path, monkeypatch):
    """A run killed in the midst leaves no step whose source is another by then, nor half of one."""
    from secateur.methods import method_class
    from secateur.methods.step import Step
    from secateur.pipeline import multi_step as sequence
    from secateur.planning.recipe import Recipe

    steps = (Step.of(method_class("modegpt")()), *(Step.of(method_class("svd")()) for _ in "ab"))
    for number in (1, 2):
        (tmp_path / f"step-{number}").mkdir()
        (tmp_path / f"step-{number}" / "plan.json").write_text("{}")
    removed, rmtree = [], sequence.shutil.rmtree

    def killed(folder, ignore_errors):
        if folder.exists():
            removed.append(folder.name)
            raise KeyboardInterrupt

    monkeypatch.setattr(sequence.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        sequence._forget(tmp_path, Recipe(steps, 0.5), 1)
    assert not (tmp_path / "step-2").exists()
    assert (tmp_path / "step-1" / "plan.json").exists()
    monkeypatch.setattr(sequence.shutil, "rmtree", rmtree)
