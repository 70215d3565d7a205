"""What version 0.3.0 wrote is still read: plans, recipes, sweeps, scores, statistics, checkpoints.

``fixtures/v0.3.0`` was written by that version's own commands; ``expected.json`` has what it said.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import secateur  # noqa: F401  (teaches transformers the classes of checkpoints)
from secateur import Calibration, MoDeGPT, Settings, Step, Store
from secateur.cli.main import main
from secateur.methods import method_class
from secateur.models.loading import skeleton
from secateur.pipeline.compress_stage import write
from secateur.pipeline.context import RunContext
from secateur.pipeline.prepare import prepare
from secateur.pipeline.run_inputs import Inputs
from secateur.planning.checks import match_units
from secateur.planning.plan import read_plan
from secateur.planning.recipe import read_recipe
from secateur.report.run_records import read_run

HERE = Path(__file__).parent / "fixtures" / "v0.3.0"
SAID = json.loads((HERE / "expected.json").read_text())
CPU = Settings(device="cpu")
CALIBRATION = Calibration("calibration.txt", samples=16, length=32)


@pytest.fixture
def room(tmp_path, monkeypatch):
    """A copy of the folder, to run commands in as they were run then."""
    shutil.copytree(HERE, tmp_path / "room")
    monkeypatch.chdir(tmp_path / "room")
    return tmp_path / "room"


def sizes_of(plan):
    """Sizes as the tables show them."""
    return {row.unit: row.after if row.form is None else row.becomes for row in plan.units}


@pytest.mark.parametrize("name", SAID["plans"])
def test_plans(room, name):
    plan = read_plan(Path("plans", f"{name}.json"))
    shown = {unit: size for unit, size in sizes_of(plan).items() if size is not None}
    assert shown == SAID["plans"][name]
    method = plan.build_method()
    assert method == method_class(plan.method.name)(**method_options(plan))
    match_units(plan, skeleton("model", CPU), method)


def method_options(plan):
    known = method_class(plan.method.name).__dataclass_fields__
    return {key: value for key, value in plan.method.options.items() if key in known}


@pytest.mark.parametrize("name", ["modegpt", "flap"])
def test_a_plan_scores_and_statistics_give_the_same_weights(room, name):
    """Nothing is measured again: another model's text would give other statistics."""
    expected = SAID["checkpoints"][name]["sha256"]
    before = {path: path.read_bytes() for path in Path("kept", name).iterdir()}
    assert made(name, "out") == expected
    assert {path: path.read_bytes() for path in Path("kept", name).iterdir()} == before


def test_kept_statistics_are_what_is_used(room):
    """Were they collected anew, damage to them would change nothing."""
    for path in Path("kept/modegpt").glob("block-*"):
        tensors = load_file(path)
        tensors["hidden.Gram.0"] = torch.eye(64).double()
        counts = {".".join(key.split(".")[:2]): "512" for key in tensors}
        save_file(tensors, path, metadata=counts)
    assert made("modegpt", "out") != SAID["checkpoints"]["modegpt"]["sha256"]


def made(name, out):
    """The digest of the weights that a plan gives from what was kept."""
    plan = read_plan(Path("checkpoints", name, "secateur", "plan.json"))
    step = Step(plan.build_method(), plan.asked_budget, plan.build_allocator())
    context, inputs = RunContext(), Inputs.of("model", CALIBRATION, CPU)
    scores, store = Path("scores", f"{name}.json"), Store(Path("kept", name))
    prepared = prepare(inputs, step, context, store=store, scores=scores)
    assert prepared.plan.sizes == plan.sizes
    write(prepared, Path(out), context)
    return hashlib.sha256(Path(out, "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("name", SAID["checkpoints"])
def test_checkpoints(name):
    opened = AutoModelForCausalLM.from_pretrained(
        HERE / "checkpoints" / name, dtype=torch.float32
    ).eval()
    with torch.no_grad():
        logits = opened(torch.tensor([SAID["ids"]])).logits[0]
    expected = SAID["checkpoints"][name]
    assert logits[:2].argmax(-1).tolist() == expected["argmax"]
    torch.testing.assert_close(logits[-1, :8], torch.tensor(expected["logits"]))
    assert float(logits.norm()) == pytest.approx(expected["norm"], rel=1e-5)


@pytest.mark.parametrize("name", SAID["checkpoints"])
def test_reports(name):
    run = read_run(HERE / "checkpoints" / name)
    assert run.report["compressed"]["perplexity"]


def test_recipes(room):
    recipe = read_recipe(Path("recipe.yaml"))
    assert [step.method.name for step in recipe.steps] == ["auto", "gptq"]
    assert recipe.keep == 0.28
    for path in Path("checkpoints").glob("*/secateur/recipe.yaml"):
        assert read_recipe(path).steps


def test_sweeps(room, monkeypatch, capsys):
    words = ["secateur", "sweep", "sweep.yaml", "out", "--dry-run", "--json"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    runs = json.loads(capsys.readouterr().out)
    assert [run["name"] for run in runs["runs"]] == SAID["sweep"]


def test_a_budget_is_what_keep_was():
    """In plans of 0.3.0 it stands among the options of the method."""
    plan = read_plan(HERE / "plans" / "modegpt.json")
    assert plan.asked_budget.keep == 0.8
    assert plan.build_method() == MoDeGPT()
