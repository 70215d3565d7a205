"""Statistics that outlast a run: used again, and refused where they are of something else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from secateur.io.atomic import _host
from secateur.pipeline import prepare


@pytest.fixture
def plan(run, model, text, tmp_path):
    """A ``plan`` that keeps its statistics, with scores of its own so that it needs them."""
    folder = tmp_path / "statistics"

    def command(name, *args):
        given = ["--calibration", text, "--samples", 4, "--length", 32, "--dry-run", "--json"]
        files = ["--statistics", folder, "--scores", tmp_path / f"{name}.json"]
        return run("plan", model, *given, *files, *args)

    command.folder = folder
    return command


def test_kept_statistics_are_not_collected_again(plan, monkeypatch):
    first = plan("first").succeeded()
    assert len(list(plan.folder.glob("block-*.safetensors"))) == 2
    monkeypatch.setattr(prepare, "calibrate", None)
    assert json.loads(plan("second").succeeded().out) == json.loads(first.out)


@pytest.mark.parametrize(
    ("changes", "field"),
    [(("--seed", 5), "calibration"), (("--method", "modegpt"), "needs")],
)
def test_statistics_of_something_else_are_refused(plan, changes, field):
    plan("first").succeeded()
    plan("second", *changes).refused("statistics", f"{field} is", "there and")


def test_statistics_of_an_older_version_are_refused(plan):
    plan("first").succeeded()
    path = plan.folder / "identity.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"secateur": "0.0.1"}))
    plan("second").refused("secateur is '0.0.1' there")


def test_a_damaged_identity_is_refused(plan):
    plan("first").succeeded()
    (plan.folder / "identity.json").write_text("{")
    plan("second").refused("identity.json")


def test_what_a_killed_run_was_writing_goes(plan):
    """And what a running one is writing stays. The mistake: to remove both, or neither."""
    plan("first").succeeded()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    numbers = (gone.pid, os.getpid())
    rests = [Path(f"{plan.folder}/block-00001.{_host()}.{n}.partial") for n in numbers]
    for rest in rests:
        rest.touch()
    plan("second").succeeded()
    assert [rest.exists() for rest in rests] == [False, True]
