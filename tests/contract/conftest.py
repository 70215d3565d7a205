"""Written checkpoints of every family, read back by fresh processes once for all tests."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from secateur import Goal, Model, Plan, make_plan, score
from secateur.allocate.base import Evidence
from secateur.methods import METHODS, method_class
from secateur.methods.base import Method
from secateur.pipeline import Prepared, Stopwatch, write
from secateur.plan import revise
from secateur.progress import Progress
from tests.conftest import Calibrated
from tests.families import FAMILIES

READER = Path(__file__).with_name("reader.py")
KINDS = ("full", "plain", "layered", "mixed", "gone")


@dataclass(frozen=True)
class Written:
    """A checkpoint, its plan, and what the model in memory said when it was written."""

    folder: Path
    plan: Plan
    ids: Tensor
    memory: dict[str, Tensor]


@pytest.fixture(scope="session", params=list(METHODS))
def method(request: pytest.FixtureRequest) -> type[Method]:
    return method_class(request.param)


@pytest.fixture(scope="session")
def stock(dense: Callable[[str], Path]) -> Callable[[str], Any]:
    """Variant name to the stock model in float64; hooks must be taken off again."""

    @cache
    def load(name: str) -> Any:
        model = AutoModelForCausalLM.from_pretrained(dense(name)).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.data = parameter.data.double()
        return model

    return load


@pytest.fixture(scope="session")
def scored(
    opened: Callable[..., Model], calibrated: Callable[[str], Calibrated]
) -> Callable[..., Evidence]:
    """What a method's calibration says about a variant."""

    @cache
    def evidence(name: str, method: type[Method]) -> Evidence:
        data = calibrated(name)
        return score(opened(name), method(), data.store, data.tokens)

    return evidence


@pytest.fixture(scope="session")
def planned(
    calibrated: Callable[[str], Calibrated], scored: Callable[..., Evidence]
) -> Callable[..., Plan]:
    """A plan for an open model."""

    def plan(model: Model, name: str, method: Method, multiple_of: int = 8) -> Plan:
        data, evidence, goal = calibrated(name), scored(name, type(method)), Goal()
        goal = replace(goal, multiple_of=multiple_of)
        return make_plan(model, method, evidence, data.record, data.tokens, goal)

    return plan


def resized(plan: Plan, model: Model, evidence: Evidence, sizes: dict[str, int]) -> Plan:
    """The plan with some sizes edited by hand."""
    rows = tuple(r.model_copy(update={"after": sizes.get(r.unit, r.before)}) for r in plan.units)
    return revise(plan.model_copy(update={"units": rows}), model, evidence)


def sizes_of(kind: str) -> dict[str, int]:
    """Hand-made sizes; units that are not named stay as they are."""
    if kind == "plain":
        return {f"layers.{i}.mlp": 40 for i in range(3)}
    if kind == "gone":  # the scores of one block, the attention of another, an MLP
        return {
            "layers.0.query_key": 0,
            "layers.1.query_key": 0,
            "layers.1.value_output": 0,
            "layers.2.mlp": 0,
        }
    return {
        "layers.1.mlp": 24,
        "layers.1.query_key": 4,
        "layers.2.mlp": 48,
        "layers.2.value_output": 3,
    }


@pytest.fixture(scope="session")
def write_to(
    opened: Callable[..., Model],
    calibrated: Callable[[str], Calibrated],
    planned: Callable[..., Plan],
    scored: Callable[..., Evidence],
) -> Callable[..., Written]:
    """Compress a variant into a folder, by hand-made sizes or as the method plans."""

    def make(folder: Path, method: type[Method], name: str, kind: str) -> Written:
        model, data = opened(name), calibrated(name)
        plan = planned(model, name, method(keep=1.0 if kind == "full" else 0.7))
        if kind in ("plain", "mixed", "gone"):
            units = {unit.name: unit for unit in model.units(8)}
            sizes = {
                u: max(size, units[u].least) for u, size in sizes_of(kind).items() if u in units
            }
            plan = resized(plan, model, scored(name, method), sizes)
        prepared = Prepared(model, data.tokens, data.store, plan.build_method(), plan)
        memory, ids = write(prepared, folder, Stopwatch(), Progress())
        return Written(folder, plan, ids, memory)

    return make


@pytest.fixture(scope="session")
def written(
    tmp_path_factory: pytest.TempPathFactory,
    write_to: Callable[..., Written],
    method: type[Method],
) -> Callable[[str, str], Written]:
    """Variant and kind to a written checkpoint: "full" is keep 1, "plain" one MLP width, "layered"
    what the method plans for 0.7, "mixed" differs in every block, "gone" lacks whole units."""
    root = tmp_path_factory.mktemp(method.name)

    @cache
    def checkpoint(name: str, kind: str) -> Written:
        return write_to(root / f"{name}-{kind}", method, name, kind)

    return checkpoint


@dataclass(frozen=True)
class Reading:
    """What a fresh process found in a checkpoint."""

    facts: dict[str, Any]
    tensors: dict[str, Tensor]


@pytest.fixture(scope="session")
def readings(
    tmp_path_factory: pytest.TempPathFactory, written: Callable[[str, str], Written]
) -> Callable[[str], Callable[[str, str], Reading]]:
    """Route to a look-up by variant and kind.

    Routes: "secateur" imports it; "stranger" cannot, and trusts the code beside the weights.
    """

    @cache
    def started() -> dict[str, tuple[Path, subprocess.Popen[str]]]:
        return {route: start(route) for route in ("secateur", "stranger")}  # side by side

    def start(route: str) -> tuple[Path, subprocess.Popen[str]]:
        kinds = KINDS if route == "stranger" else ("layered", "mixed", "gone")
        folder = tmp_path_factory.mktemp(route)
        jobs = {}
        for name in FAMILIES:
            for kind in kinds:
                made = written(name, kind)
                ids = made.ids.tolist()
                jobs[f"{name}/{kind}"] = {"folder": str(made.folder), "ids": ids}
        (folder / "jobs.json").write_text(json.dumps(jobs))
        return folder, run_reader(route, folder)

    @cache
    def read(route: str) -> Callable[[str, str], Reading]:
        folder, process = started()[route]
        _, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]
        facts = json.loads((folder / "facts.json").read_text())
        tensors = load_file(folder / "tensors.safetensors")

        def look_up(name: str, kind: str) -> Reading:
            job = f"{name}/{kind}"
            assert "error" not in facts[job], facts[job]["error"]
            own = {k[len(job) + 1 :]: v for k, v in tensors.items() if k.startswith(job + ":")}
            return Reading(facts[job], own)

        return look_up

    return read


def run_reader(route: str, folder: Path) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "HF_MODULES_CACHE": str(folder / "modules"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    if route == "secateur":
        environment["PYTHONPATH"] = str(READER.parents[2])
    return subprocess.Popen(
        [sys.executable, str(READER), route, str(folder)],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def spread(found: Tensor, expected: Tensor) -> float:
    """Largest difference, in units of the expected numbers' spread."""
    return float((found.double() - expected.double()).abs().max() / expected.double().std())


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits
