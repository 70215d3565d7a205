"""Shared fixtures: one dense checkpoint and one calibration a family for the whole session."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="secateur-tests-")  # not the user's

from secateur import Calibration, Model, Settings, Store, calibrate, open_model
from secateur.data.tokens import Tokens
from secateur.methods import method_classes
from tests.support import families

torch.set_num_threads(1)

SAMPLES, LENGTH = 6, 32


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
