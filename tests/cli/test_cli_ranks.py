"""The command line under torchrun: the result of one process, and a rank that is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support.processes import free_port

ROOT = Path(__file__).parents[2]

ASKED = [
    "--keep",
    "0.7",
    "--samples",
    "16",
    "--eval-windows",
    "2",
    "--no-speed",
    "--new-tokens",
    "2",
]


def started(ranks, *arguments, cache):
    run = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(ranks),
        "--master-port",
        str(free_port()),
    ]
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cache)}
    return subprocess.Popen(
        [sys.executable, *(run if ranks else []), "-m", "secateur", *map(str, arguments)],
        env={**os.environ, **own},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def rank_of(process):
    """By their number, the ids of the ranks that torchrun has started."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            given = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if int(fields[1]) == process.pid:
            found |= {int(v[5:]): int(entry.name) for v in given if v.startswith("RANK=")}
    return found


def sizes(out):
    plan = json.loads((out / "secateur" / "plan.json").read_text())
    return {row["unit"]: row["after"] for row in plan["units"]}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ranks are found in /proc")
def test_a_rank_is_killed_and_the_command_typed_again(tmp_path):
    alone, shared, cache = tmp_path / "alone", tmp_path / "shared", tmp_path / "cache"
    journal = tmp_path / ".shared.partial" / "narrowing" / "journal.json"
    first = started(2, "compress", "demo", shared, *ASKED, cache=cache)
    while not journal.exists():
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    os.kill(rank_of(first)[1], signal.SIGKILL)
    _, said = first.communicate(timeout=60)
    assert first.returncode
    assert said.count("error: ") == 1
    assert "error: rank 1 of 2" in said
    assert journal.exists()
    assert not shared.exists()
    done = len(json.loads(journal.read_text())["blocks"])
    assert done
    again = started(2, "compress", "demo", shared, *ASKED, cache=cache)
    _, said = again.communicate(timeout=900)
    assert again.returncode == 0, said
    plain = started(0, "compress", "demo", alone, *ASKED, cache=tmp_path / "other")
    _, said = plain.communicate(timeout=900)
    assert plain.returncode == 0, said
    assert sizes(shared) == sizes(alone)
    expected, found = (load_file(out / "model.safetensors") for out in (alone, shared))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        rest = float((found[name].double() - tensor.double()).norm())
        assert rest <= 1e-5 * float(tensor.double().norm()), name


@pytest.mark.slow
def test_what_is_wrong_is_said_once(tmp_path):
    run = started(2, "compress", "demo", tmp_path / "out", "--keep", "7", cache=tmp_path)
    _, said = run.communicate(timeout=300)
    assert run.returncode
    assert said.count("error: ") == 1
    assert "keep" in said
    run = started(2, "eval", "demo", cache=tmp_path)
    _, said = run.communicate(timeout=300)
    assert run.returncode
    assert said.count("error: ") == 1
    assert "without torchrun" in said


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ranks are found in /proc")
def test_torchrun_and_the_first_rank_are_killed(tmp_path):
    run = started(3, "compress", "demo", tmp_path / "out", *ASKED, cache=tmp_path / "cache")
    while not (tmp_path / ".out.partial").exists():
        assert run.poll() is None, run.communicate()
        time.sleep(0.05)
    first = rank_of(run)[0]
    run.kill()
    os.kill(first, signal.SIGKILL)
    _, said = run.communicate(timeout=60)  # of those that are left, too
    assert said.count("error: ") == 1
    assert "error: rank 0 of 3 is gone" in said
    assert "frame #" not in said  # of the connection that broke
