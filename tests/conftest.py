"""Shared fixtures: one dense checkpoint and one calibration a family for the whole session."""

import os
import subprocess
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="secateur-tests-")  # not the user's

from secateur import Calibration, Model, Settings, Store, calibrate, open_model
from secateur.data.tokens import Tokens
from secateur.methods import method_classes
from tests.support import covering, families, met

torch.set_num_threads(1)

SAMPLES, LENGTH = 6, 32
LACKING = pytest.StashKey[list[str]]()


@pytest.hookimpl(tryfirst=True)  # before markers are looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    covering.thin(items)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hold what the whole run met against all that there is; workers hand on what they met."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["met"] = sorted(met.MET)
    elif whole(session.config) and (lacking := met.unmet(met.MET)):
        session.config.stash[LACKING] = lacking
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    met.MET.update(tuple(own) for own in getattr(node, "workeroutput", {}).get("met", ()))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for lacking in config.stash.get(LACKING, ()):
        terminalreporter.write_line(f"no test of this run met {lacking}", red=True)


def whole(config: pytest.Config) -> bool:
    """Whether the run was asked for all tests, or all fast ones."""
    options = config.option
    picked = (
        options.keyword or options.deselect or options.collectonly or getattr(options, "lf", False)
    )
    everything = config.args_source == pytest.Config.ArgsSource.TESTPATHS
    return everything and not picked and options.markexpr in ("", "not slow")


@dataclass(frozen=True)
class Calibrated:
    """Statistics of a dense model, and the tokens that they are of."""

    tokens: Tokens
    store: Store
    record: Calibration


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Variant name to the folder of its dense checkpoint."""
    root = tmp_path_factory.mktemp("dense")

    @cache
    def folder(name: str) -> Path:
        return families.save(families.random_model(name), root / name)

    return folder


@pytest.fixture(scope="session")
def opened(dense: Callable[[str], Path]) -> Callable[..., Model]:
    """Variant name and compute dtype to a model that the caller may change."""

    def fresh(name: str, dtype: str = "float32") -> Model:
        return open_model(dense(name), Settings(device="cpu", dtype=dtype))

    return fresh


@pytest.fixture(scope="session")
def calibrated(opened: Callable[..., Model]) -> Callable[[str], Calibrated]:
    """Variant name to statistics for all methods and their allocators; not to be changed."""
    needs = frozenset()
    for method in method_classes().values():
        needs |= method().needs | method().allocator.needs

    @cache
    def statistics(name: str) -> Calibrated:
        tokens = families.read(name, SAMPLES, LENGTH)
        store = Store()
        calibrate(opened(name, "float64"), tokens, needs, store)
        return Calibrated(tokens, store, Calibration("stream", SAMPLES, LENGTH, 0))

    return statistics


@pytest.fixture
def near(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make the measuring process a call, which saves seconds; the value lists what it was asked."""
    from secateur.evaluate import evaluator

    measured: list[str] = []

    def call(command: list[str], **_: Any) -> Any:
        request, result = map(Path, command[-2:])
        measured.append(request.read_text())
        try:
            return SimpleNamespace(returncode=evaluator.main(request, result))
        except Exception:
            traceback.print_exc()
            return SimpleNamespace(returncode=1)

    monkeypatch.setattr(
        evaluator, "subprocess", SimpleNamespace(DEVNULL=subprocess.DEVNULL, run=call)
    )
    return measured
