"""The example package: installed as a user installs it, found, run, and held to the contract."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.families import words

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "secateur-example-method"
NAME, PACKAGE = "example-norm", "secateur-example-method 1.0"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder that pip has installed the example into, offline and beside this environment."""
    made = tmp_path_factory.mktemp("extension")
    source = shutil.copytree(EXAMPLE, made / "source")  # where setuptools leaves its own files
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", *offline]
    subprocess.run([*command, "--target", str(made / "site"), str(source)], check=True)
    return made / "site"


def ran(site, *arguments):
    """What a fresh interpreter does that has the package, or has not."""
    paths = [str(ROOT), *([str(site)] if site else [])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "100"}
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def compressed(site, dense, tmp_path_factory):
    """A checkpoint that the command line made by the example."""
    folder = tmp_path_factory.mktemp("compressed")
    (folder / "text.txt").write_text(words(1500))
    out = folder / "small"
    given = ["--calibration", folder / "text.txt", "--samples", 8, "--length", 32, "--no-speed"]
    given += ["--eval-windows", 2, "--new-tokens", 4, "--keep", 0.7, "--power", 0.5]
    done = ran(site, "secateur", "compress", dense("llama"), out, "--method", NAME, *given)
    assert done.returncode == 0, done.stderr
    return out


def test_it_is_listed_with_its_package(site):
    listed = json.loads(ran(site, "secateur", "ls", "--json").stdout)
    (entry,) = [method for method in listed["methods"] if method["name"] == NAME]
    assert entry["package"] == PACKAGE
    assert entry["options"]["power"]["default"] == 1.0
    assert listed["problems"] == []


def test_it_gets_command_line_budget_checkpoint_and_report(compressed):
    from transformers import AutoModelForCausalLM

    plan = json.loads((compressed / "secateur" / "plan.json").read_text())
    assert plan["method"] == {"name": NAME, "options": {"power": 0.5}, "package": PACKAGE}
    assert 0.6 < plan["budget"]["reached"] <= 0.7
    assert NAME in (compressed / "secateur" / "report.html").read_text()
    model = AutoModelForCausalLM.from_pretrained(compressed)  # needs the example no longer
    widths = {row["unit"]: row["after"] for row in plan["units"]}
    for i, layer in enumerate(model.model.layers):
        assert layer.mlp.down_proj.in_features == widths[f"layers.{i}.mlp"]


def test_where_it_is_not_installed_its_plan_says_what_is_missing(compressed, tmp_path):
    plan = compressed / "secateur" / "plan.json"
    done = ran(None, "secateur", "compress", "demo", tmp_path / "out", "--plan", plan)
    assert done.returncode == 2
    assert f"Package '{PACKAGE}' declared it" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_contract_suite_takes_it(site):
    tests = ("identity", "equivalence", "quality")
    files = [f"tests/contract/test_{part}.py" for part in tests]
    chosen = ["-k", f"{NAME} and qwen3", "-m", "", "-p", "no:cacheprovider", "-p", "no:randomly"]
    done = ran(site, "pytest", *files, *chosen)
    assert done.returncode == 0, done.stdout[-3000:]
    passed = int(done.stdout.split(" passed")[0].split()[-1])
    assert passed >= 20
    assert "failed" not in done.stdout
