"""Written checkpoints of every family, read back by fresh processes once for all tests."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur import Budget, Model, Plan, make_plan, score
from secateur.allocate.base import Evidence
from secateur.data.tasks import use_of
from secateur.data.tokens import Tokens
from secateur.methods import method_class, method_classes
from secateur.methods.base import Method
from secateur.models.model import anatomy_of
from secateur.pipeline.compress_stage import write
from secateur.pipeline.context import RunContext
from secateur.planning.planner import revise
from secateur.structure.units import DEPTH, MATRICES, STREAM, Unit
from tests.conftest import Calibrated
from tests.support.families import AUTO, FAMILIES
from tests.support.steps import prepared_of

READER = Path(__file__).with_name("reader.py")
KINDS = ("full", "plain", "layered", "mixed", "gone")

#: The method that is tested on every variant, and the variants that every method is tested on: one
#: without biases, one with biases everywhere, one with norms in its heads. The rest is slow.
EVERYWHERE = "auto"
ALWAYS = ("llama", "gpt2", "qwen3")
#: methods that narrow, of extensions too; those that keep widths have tests of their
#: own (test_forms.py)
NARROWING = [name for name, kind in method_classes().items() if kind.kinds != MATRICES]


@pytest.hookimpl(tryfirst=True)  # before markers are looked at
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    own = {item: parameters(item) for item in items if READER.parent in item.path.parents}
    unserved = {
        i for i, asked in own.items() if not is_served(asked.get("method"), asked.get("name"))
    }
    config.hook.pytest_deselected(items=list(unserved))
    items[:] = [item for item in items if item not in unserved]
    for item, asked in own.items():
        special = asked.get("name", ALWAYS[0]) not in ALWAYS
        if special and asked.get("method", EVERYWHERE) != EVERYWHERE:
            item.add_marker(pytest.mark.slow)


@cache
def is_served(method: str | None, name: str | None) -> bool:
    """Whether a method can change anything in a variant."""
    if method is None or name is None:
        return True
    return method_class(method.partition(" ")[0])().obstacle(shapes(name)) is None


@cache
def shapes(name: str) -> Model:
    """A variant without storage, as it is looked at before any weight is read."""
    config: Any = open_config(name)
    with torch.device("meta"):
        module = FAMILIES[name].auto.from_config(config)
    nothing: Any = None
    return Model(name, module, nothing, torch.float32, anatomy_of(config))


def open_config(name: str) -> Any:
    return getattr(transformers, FAMILIES[name].config)(**FAMILIES[name].options)


def parameters(item: pytest.Item) -> dict[str, Any]:
    found: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
    return found


def methods(applies: Callable[[type[Method]], bool]) -> Any:
    """The test is for methods to which something applies."""
    names = [name for name in NARROWING if applies(method_class(name))]
    return pytest.mark.parametrize("method", names, indirect=True)


def by_blocks() -> Any:
    """The test is for methods whose units each belong to one block."""
    return methods(lambda method: method.kinds != STREAM)


def by_widths() -> Any:
    """The test is for methods that narrow what is inside blocks."""
    return methods(lambda method: method.kinds not in (STREAM, DEPTH))


def narrowing(kind: str) -> Any:
    """The test is for methods that narrow this kind of units."""
    return methods(lambda method: kind in method.kinds)


@dataclass(frozen=True)
class Written:
    """A checkpoint, its plan, and what the model in memory said of a row when it was written."""

    folder: Path
    plan: Plan
    tokens: Tokens
    memory: dict[str, Tensor]


@pytest.fixture(scope="session", params=NARROWING)
def method(request: pytest.FixtureRequest) -> type[Method]:
    return method_class(request.param)


@pytest.fixture(scope="session")
def stock(dense: Callable[[str], Path]) -> Callable[[str], Any]:
    """Variant name to the stock model in float64; hooks must be taken off again."""

    @cache
    def load(name: str) -> Any:
        model = FAMILIES[name].auto.from_pretrained(dense(name)).eval().requires_grad_(False)
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

    def plan(
        model: Model, name: str, method: Method, multiple_of: int = 8, keep: float | None = None
    ) -> Plan:
        data, evidence = calibrated(name), scored(name, type(method))
        budget = Budget(keep=keep, target="parameters", multiple_of=multiple_of)
        spends = method.allocator
        if hasattr(spends, "steps"):  # of a search: a few serve as well here
            spends = replace(spends, steps=8)
        return make_plan(
            model,
            method,
            evidence,
            data.record,
            data.tokens,
            budget=budget,
            allocator=spends,
            store=data.store,
        )

    return plan


def resized(plan: Plan, model: Model, evidence: Evidence, sizes: dict[str, int]) -> Plan:
    """The plan with some sizes edited by hand."""
    rows = tuple(r.model_copy(update={"after": sizes.get(r.unit, r.before)}) for r in plan.units)
    plan = plan.model_copy(update={"units": rows})
    return revise(plan, model, plan.build_method(), evidence)


def sizes_of(kind: str, units: dict[str, Unit]) -> dict[str, int]:
    """Hand-made sizes of those of ``units`` that don't stay as they are."""
    if kind == "plain":
        wanted = {f"layers.{i}.mlp": 40 for i in range(3)} | {"layers.1.block": 0}
    elif kind == "gone":  # the scores of one block, the attention of another, an MLP
        wanted = {
            "layers.0.query_key": 0,
            "layers.0.heads": 1,
            "layers.1.query_key": 0,
            "layers.1.value_output": 0,
            "layers.1.heads": 0,
            "layers.2.mlp": 0,
            "layers.0.block": 0,
            "layers.2.block": 0,
            "residual": 8,
        }
    else:
        wanted = {
            "layers.1.mlp": 24,
            "layers.1.query_key": 4,
            "layers.1.heads": 1,
            "layers.2.mlp": 48,
            "layers.2.value_output": 3,
            "layers.2.block": 0,
            "residual": 16,
        }
        if (heads := units.get("layers.2.heads")) is not None:
            wanted[heads.name] = heads.size - 1
    return {name: max(size, units[name].least) for name, size in wanted.items() if name in units}


def for_stock_classes(method: type[Method]) -> Method:
    """The method without biases that stock classes may have no place for."""
    if method().biased:
        assert "compensate" in {field.name for field in fields(method)}
        return method(compensate=0)
    return method()


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
        made = for_stock_classes(method) if kind == "plain" else method()
        plan = planned(model, name, made, keep=1.0 if kind == "full" else 0.7)
        if kind in ("plain", "mixed", "gone"):
            sizes = sizes_of(kind, {unit.name: unit for unit in made.units(model, 8)})
            plan = resized(plan, model, scored(name, method), sizes)
        memory, tokens = write(prepared_of(model, data, plan), folder, RunContext())
        return Written(folder, plan, tokens, memory)

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
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    written: Callable[[str, str], Written],
    method: type[Method],
) -> Callable[[str], Callable[[str, str], Reading]]:
    """Route to a look-up by variant and kind.

    Routes: "secateur" imports it; "stranger" cannot, and trusts the code beside the weights.
    Variants that no test asks for are not written.
    """
    asked = [parameters(item) for item in request.session.items]
    names = {own.get("name") for own in asked if own.get("method") == method.name}

    @cache
    def started() -> dict[str, tuple[Path, subprocess.Popen[str]]]:
        return {route: start(route) for route in ("secateur", "stranger")}  # side by side

    def start(route: str) -> tuple[Path, subprocess.Popen[str]]:
        kinds = KINDS if route == "stranger" else ("layered", "mixed", "gone")
        folder = tmp_path_factory.mktemp(route)
        jobs, given = {}, {}
        for name in (name for name in FAMILIES if name in names):
            for kind in kinds:
                made, job = written(name, kind), f"{name}/{kind}"
                jobs[job] = {"folder": str(made.folder), "auto": AUTO[FAMILIES[name].use]}
                given |= {
                    f"{job}:{key}": value for key, value in asked_with(name, made.tokens).items()
                }
        (folder / "jobs.json").write_text(json.dumps(jobs))
        save_file(given, folder / "inputs.safetensors")
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


def asked_with(name: str, tokens: Tokens) -> dict[str, Tensor]:
    """A row as the arguments of a forward with a loss."""
    asked = use_of(open_config(name)).inputs(tokens)
    labels = tokens.ids if tokens.labels is None else tokens.labels
    return {k: v for k, v in asked.items() if isinstance(v, Tensor)} | {"labels": labels.clone()}


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


ROUNDING = 5e-5  # of float32 logits, in units of their spread


def spread(found: Tensor, expected: Tensor) -> float:
    """Largest difference, in units of the expected numbers' spread."""
    return float((found.double() - expected.double()).abs().max() / expected.double().std())


def logits(model: Any, given: Tokens | Tensor) -> Tensor:
    """What a transformers model says, of token ids if it is a causal one."""
    if isinstance(given, Tensor):
        given = Tokens(given, torch.ones_like(given, dtype=torch.bool))
    with torch.inference_mode():
        return model(**use_of(model.config).inputs(given)).logits


def states(model: Any, given: Tokens) -> Tensor:
    """What its body says."""
    with torch.inference_mode():
        return model.base_model(**use_of(model.config).inputs(given)).last_hidden_state
