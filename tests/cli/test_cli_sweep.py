"""Many runs of one model: what they share, how a sweep goes on, and what it leaves."""

import builtins
import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import filelock
import pytest
import yaml
from conftest import ROOT, SMALL

GRID = ["--method", "modegpt,wanda-sp", "--keep", "0.9,0.7"]
PAIR = ["--method", "modegpt,wanda-sp", "--keep", "0.9"]
NAMES = ["modegpt-0.7", "modegpt-0.9", "wanda-sp-0.7", "wanda-sp-0.9"]
SHEETS = ["frontier.html", "frontier.json", "frontier.svg"]
BYTES = ("model.safetensors", "secateur/plan.json", "secateur/recipe.yaml")


@pytest.fixture
def sweep(run, near, model, text, held, room):
    """A small, quick sweep into ``room/out``; more arguments override."""

    def command(*args, out=None):
        given = ["--calibration", text, "--eval", held, *SMALL]
        return run("sweep", model, out or room / "out", *given, *args)

    return command


@pytest.fixture
def counted(monkeypatch, forget):
    """How often the dear parts of a run are done, in an empty cache."""
    from secateur.pipeline import prepare

    forget()
    calls = []

    def counting(name, original):
        def call(*args, **named):
            calls.append(name)
            return original(*args, **named)

        return call

    for name in ("calibrate", "score"):
        monkeypatch.setattr(prepare, name, counting(name, getattr(prepare, name)))
    return calls


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def made(out):
    return {name: (out / name).read_bytes() for name in BYTES}


def test_one_command_gives_the_frontier(sweep, run, room, near, counted, model):
    shown = sweep(*GRID).succeeded()
    assert names(room / "out") == sorted([".shared", *SHEETS, *NAMES])
    assert max(len(line) for line in shown.out.splitlines() if "/" not in line) <= 100
    for word in (*NAMES, "dense", "dominated on", "frontier.html"):
        assert word in shown.out
    # what runs share is done once
    assert counted == ["calibrate", "score"] * 2
    asked = [json.loads(request)["source"] for request in near]
    assert asked.count(str(model)) == 1
    assert len(asked) == 5
    assert not (room / "out" / ".shared" / "statistics").exists()
    # and it is what `compare OUT/*` says
    content = json.loads((room / "out" / "frontier.json").read_text())
    runs = sorted(entry for entry in (room / "out").iterdir() if entry.name != ".shared")
    compared = json.loads(run("compare", *runs, "--json").succeeded().out)
    assert sorted(e["name"] for e in compared["runs"]) == sorted(e["name"] for e in content["runs"])
    assert compared["dense"] == content["dense"]
    page = (room / "out" / "frontier.html").read_text()
    for name in NAMES:
        assert f'href="{name}/secateur/report.html"' in page
    own = (room / "out" / NAMES[0] / "secateur" / "report.html").read_text()
    assert "measured once for all runs" in own
    assert "in the same run" not in own


def test_a_run_of_a_sweep_is_the_one_that_compress_writes(sweep, compress, room):
    sweep("--method", "modegpt", "--keep", "0.9,0.7").succeeded()
    compress("--method", "modegpt", "--keep", "0.7", out=room / "alone").succeeded()
    assert made(room / "out" / "modegpt-0.7") == made(room / "alone")
    own, alone = (
        json.loads((folder / "secateur" / "report.json").read_text())
        for folder in (room / "out" / "modegpt-0.7", room / "alone")
    )
    for key in ("perplexity", "agreement", "bytes"):
        assert own["compressed"][key] == alone["compressed"][key]
    assert (own["dense_shared"], alone["dense_shared"]) == (True, False)
    assert own["command"].startswith("secateur sweep ")


def test_what_is_finished_is_not_done_again(sweep, room, near, monkeypatch):
    from secateur.sweeps import job

    given = ["--method", "modegpt", "--keep"]
    sweep(*given, "0.9").succeeded()
    weights = room / "out" / "modegpt-0.9" / "model.safetensors"
    then = weights.stat().st_mtime_ns
    near.clear()
    sweep(*given, "0.9,0.7").succeeded()
    assert len(near) == 1  # the other run, and no dense model
    assert weights.stat().st_mtime_ns == then
    monkeypatch.setattr(job, "run", lambda *_, **__: pytest.fail("done again"))
    near.clear()
    assert "modegpt-0.7" in sweep(*given, "0.9,0.7").succeeded().out
    assert near == []


def test_an_interrupted_sweep_goes_on_and_gives_the_same_bytes(sweep, room, monkeypatch, forget):
    from secateur.pipeline import compress_stage as pipeline

    given = ["--method", "modegpt", "--keep", "0.9,0.7"]
    forget()
    sweep(*given, out=room / "undisturbed").succeeded()
    forget()
    original, calls = pipeline.write, []

    def stops(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write", stops)
        found = sweep(*given)
    assert found.code == 130
    assert "To resume a compress or sweep command, repeat it." in found.err
    assert names(room / "out") == [".modegpt-0.7.partial", ".shared", "modegpt-0.9"]
    sweep(*given).succeeded()
    assert names(room / "out") == sorted([".shared", *SHEETS, *NAMES[:2]])
    for name in NAMES[:2]:
        assert made(room / "out" / name) == made(room / "undisturbed" / name)


def test_one_run_that_fails_does_not_end_the_others(sweep, room, monkeypatch):
    from secateur.pipeline import compress as pipeline
    from secateur.utils.errors import RunError

    original = pipeline.judge_result

    def fails(task, *args):
        if task.workspace.out.name == "modegpt-0.9":
            raise RunError("it is another model.")
        return original(task, *args)

    monkeypatch.setattr(pipeline, "judge_result", fails)
    found = sweep("--method", "modegpt,wanda-sp", "--keep", "0.9,0.001")
    assert found.code == 2
    assert "3 of 4 runs" in found.message[0]
    assert "failed: modegpt-0.9: it is another model." in found.out
    assert "failed: wanda-sp-0.001: keep 0.001 is out of reach" in found.out
    assert "Traceback" not in found.err
    assert names(room / "out") == sorted([".shared", *SHEETS, "wanda-sp-0.9"])
    content = json.loads((room / "out" / "frontier.json").read_text())
    assert sorted(content["failed"]) == ["modegpt-0.001", "modegpt-0.9", "wanda-sp-0.001"]
    assert "it is another model." in (room / "out" / "frontier.html").read_text()
    assert (room / "out" / ".shared" / "statistics").is_dir()  # as it may be typed again


def test_a_sweep_of_which_nothing_can_be_done_leaves_nothing(sweep, room):
    found = sweep("--method", "modegpt", "--keep", "0.001")
    assert found.code == 2
    assert "1 of 1 runs" in found.message[0]
    assert names(room) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--samples", 5], ["another calibration: samples (4, now 5)"]),
        (["--eval-windows", 3], ["another questions: windows"]),
        (["--multiple-of", 4], ["run 'modegpt-0.9'", "multiple_of: 8", "multiple_of: 4"]),
        (["--allocator", "uniform"], ["run 'modegpt-0.9'", "influence", "uniform"]),
    ],
)
def test_a_changed_sweep_is_refused_by_what_differs(sweep, room, flags, words):
    given = ["--method", "modegpt", "--keep", "0.9"]
    sweep(*given).succeeded()
    before = {path: path.stat().st_mtime_ns for path in (room / "out").rglob("*")}
    sweep(*given, *flags).refused(*words)
    assert {path: path.stat().st_mtime_ns for path in (room / "out").rglob("*")} == before


def test_places_that_are_something_else_are_refused(sweep, room, model, held):
    (room / "file").write_text("")
    sweep(out=room / "file").refused("is a file")
    (room / "mine").mkdir()
    (room / "mine" / "letter").write_text("dear")
    sweep(out=room / "mine").refused("no sweep's")
    sweep("--keep", "0.9", out=model).refused(str(model))
    assert names(room / "mine") == ["letter"]


def test_a_run_that_is_none_is_refused(sweep, room):
    sweep("--method", "modegpt", "--keep", "0.9").succeeded()
    (room / "out" / "flap-0.9").mkdir()
    sweep("--method", "modegpt,flap", "--keep", "0.9").refused("flap-0.9", "report.json")


def test_two_sweeps_in_one_folder(sweep, room):
    (room / "out" / ".shared").mkdir(parents=True)
    with filelock.FileLock(room / "out" / ".shared" / "lock"):
        sweep("--method", "modegpt").refused("another sweep is writing")


def test_a_dry_run_lists_and_starts_nothing(sweep, room, near):
    shown = sweep(*GRID, "--dry-run").succeeded()
    assert max(len(line) for line in shown.out.splitlines() if "/" not in line) <= 100
    assert "4 of 4 runs to do" in shown.out
    assert names(room) == []
    assert near == []
    content = json.loads(sweep(*GRID, "--dry-run", "--json").succeeded().out)
    assert [(run["name"], run["scores_of"]) for run in content["runs"]] == [
        ("modegpt-0.9", None),
        ("modegpt-0.7", "modegpt-0.9"),
        ("wanda-sp-0.9", None),
        ("wanda-sp-0.7", "wanda-sp-0.9"),
    ]
    sweep("--method", "modegpt", "--keep", "0.9").succeeded()
    content = json.loads(sweep(*GRID, "--keep", "0.9,0.001", "--dry-run", "--json").out)
    assert {run["name"]: run["state"] for run in content["runs"]} == {
        "modegpt-0.9": "finished",
        "wanda-sp-0.9": "to do",
        "modegpt-0.001": "refused",
        "wanda-sp-0.001": "refused",
    }


def test_a_sweep_in_a_file(run, near, room, model, text, held, monkeypatch):
    """With a recipe; a flag that is typed takes the place of what the file says."""
    monkeypatch.chdir(room)
    (room / "steps.yaml").write_text(
        "steps: [{method: modegpt, multiple_of: 2}, {method: svd-llm, keep: 0.85}]"
    )
    content = {
        "version": 1,
        "model": str(model),
        "keep": [0.9],
        "runs": [
            {"method": "modegpt", "allocator": ["influence", "uniform"]},
            {"recipe": "steps.yaml", "keep": 0.6},
        ],
        "calibration": {"source": str(text), "samples": 99, "length": 32},
        "evaluate": {"texts": [str(held)], "windows": 2, "speed": False, "new_tokens": 4},
    }
    (room / "small.yaml").write_text(yaml.safe_dump(content))
    shown = run("sweep", "small.yaml", "--samples", 4, "--json").succeeded()
    made = ["modegpt-0.9-influence", "modegpt-0.9-uniform", "steps-0.6"]
    assert names(room / "small") == sorted([".shared", *SHEETS, *made])
    assert [entry["name"] for entry in json.loads(shown.out)["runs"]] == made
    recipe = yaml.safe_load((room / "small/steps-0.6/secateur/recipe.yaml").read_text())
    assert recipe["calibration"]["samples"] == 4
    assert recipe["evaluate"]["windows"] == 2
    assert len(near) == 4  # the dense model once, for runs of one step and of two
    near.clear()
    run("sweep", "small.yaml", "--samples", 4).succeeded()
    assert near == []


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["demo"], ["give the folder"]),
        (["missing.yaml"], ["missing.yaml"]),
        (["demo", "out", "--keep", "0.9,x"], ["--keep", "0.9,0.8"]),
        (["demo", "out", "--keep", "1.5"], ["--keep"]),
        (["demo", "out", "--keep", ","], ["--keep"]),
        (["demo", "out", "--multiple-of", "8,x"], ["--multiple-of"]),
        (["demo", "out", "--method", "auto,flop"], ["flap"]),
        (["demo", "out", "--method", "flap", "--iterations", "3"], ["auto", "sweep file"]),
        (["demo", "out", "--itterations", "3"], ["--itterations"]),
        (["demo", "out", "--cpus", "2"], ["--ray"]),
        (["demo", "out", "--jobs", "2", "--ray"], ["--jobs and --ray"]),
        (["demo", "out", "--recipe", "r.yaml", "--tier", "plain"], ["--tier"]),
        (["s.yaml", "--method", "auto"], ["--method and a sweep file"]),
        (["s.yaml", "--for", "gguf"], ["--for and a sweep file"]),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(run, room, monkeypatch, args, words):
    monkeypatch.chdir(room)
    run("sweep", *args).refused(*words)
    assert names(room) == []


def test_a_file_without_a_model_is_refused(run, room):
    (room / "s.yaml").write_text("runs: [{method: auto}]")
    run("sweep", room / "s.yaml").refused("names no model")


def test_without_ray_it_says_how_to_get_it(sweep, room, monkeypatch):
    original = builtins.__import__

    def fails(name, *args, **options):
        if name == "ray":
            raise ImportError(name)
        return original(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", fails)
    sweep("--ray").refused('pip install "secateur[ray]"')
    assert names(room) == []


def typed(model, text, held, out, *args):
    given = [str(x) for x in (model, out, "--calibration", text, "--eval", held, *SMALL, *args)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    return subprocess.Popen(
        [sys.executable, "-m", "secateur", "sweep", *given],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_processes_side_by_side(sweep, room, model, text, held, forget):
    """The mistake: children that outlive a killed sweep, and keep the locks of their runs."""
    forget()
    sweep(*PAIR, out=room / "alone").succeeded()
    out = room / "out"
    started = typed(model, text, held, out, *PAIR, "--jobs", 2)
    while started.poll() is None and not (found := [*out.glob(".*.partial")]):
        time.sleep(0.05)
    started.send_signal(signal.SIGKILL)
    started.communicate()
    with filelock.FileLock(found[0] / "lock", timeout=5):
        assert found[0].is_dir()
        assert not (out / "frontier.html").exists()
    again = typed(model, text, held, out, *PAIR, "--jobs", 2)
    shown, told = again.communicate(timeout=500)
    assert again.returncode == 0, told
    for name in NAMES[1::2]:
        assert made(out / name) == made(room / "alone" / name)
    assert "wanda-sp-0.9: done" in told
    assert "frontier.html" in shown


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra ray")
def test_tasks_of_ray(sweep, room, model, text, held, forget):
    forget()
    sweep(*PAIR, out=room / "alone").succeeded()
    done = typed(model, text, held, room / "out", *PAIR, "--ray")
    shown, told = done.communicate(timeout=500)
    assert done.returncode == 0, told
    assert len(told.splitlines()) == 6, told  # Ray's own words are not among them
    assert "frontier.html" in shown
    for name in NAMES[1::2]:
        assert made(room / "out" / name) == made(room / "alone" / name)
    too_many = typed(model, text, held, room / "other", *PAIR, "--ray", "--cpus", 9999)
    assert "--cpus 9999" in too_many.communicate(timeout=500)[1]
    assert too_many.returncode == 2
