"""Statistics in a folder: their shapes, and files that a stranger may have put there."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur import InputError, Store
from secateur.calibration.needs import Need, Needs
from secateur.io.safetensors_header import read_whole
from secateur.methods import METHODS, method_class
from tests.support.families import FAMILIES

OWN = {"model": "a"}
NEEDS = frozenset({Needs.HIDDEN_GRAM, Needs.VALUE_GRAM, Needs.QUERY_ENERGY, Needs.ANGLE})
EVERY = frozenset[Need]().union(
    *(m().needs | m().allocator.needs for m in map(method_class, METHODS))
)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_sum_has_the_shape_that_its_block_gives_it(opened, calibrated, name):
    model, store = opened(name), calibrated(name).store
    kinds = set()
    for block in model.blocks:
        for need, statistic in store.get(block.index, EVERY | {Needs.INFLUENCE}).items():
            kinds.add(need.kind)
            expected = need.kind.shape(*block.features(need.site))
            assert tuple(statistic.total.shape) == expected, need
            assert bool((need.kind.squares(statistic.total) >= 0).all()), need
    assert len(kinds) >= 8


@pytest.fixture
def kept(opened, calibrated, tmp_path):
    """A folder with the statistics of a small model, and that model."""
    model, store = opened("llama"), Store(tmp_path / "statistics")
    store.claim(OWN, NEEDS, model.blocks)
    for block in model.blocks:
        store.put(
            block.index,
            calibrated("llama").store.get(block.index, NEEDS | {Needs.INFLUENCE}),
        )
    store.claim(OWN, NEEDS, model.blocks)
    return model, store


def change(store, with_counts=None, **tensors):
    """Put other tensors into the first block's file; None takes one out."""
    path = store.folder / "block-00000.safetensors"
    counts = read_whole(path)[1] | (with_counts or {})
    found = load_file(path) | {name.replace("__", "."): t for name, t in tensors.items()}
    save_file({name: tensor for name, tensor in found.items() if tensor is not None}, path, counts)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"hidden__Gram__0": torch.ones(3, 3)}, r"\(3, 3\)"),
        ({"hidden__Gram__0": torch.empty(0, 18_000)}, "18000"),
        ({"hidden__Gram__0": torch.empty(0, 2**40)}, str(2**40)),
        ({"hidden__Gram__0": None}, "missing"),
        ({"value__HeadGram": torch.ones(2)}, "HeadGram"),
        ({"query__Energy": torch.tensor(1.0)}, "Energy"),
        ({"block__Angle": torch.ones(1)}, "Angle"),
    ],
)
def test_sums_of_other_shapes_are_refused_before_they_are_read(kept, monkeypatch, tensors, words):
    model, store = kept
    doubled = {name: t if t is None else t.double() for name, t in tensors.items()}
    change(store, **doubled)
    monkeypatch.setattr("secateur.calibration.collect.read_tensor", None)
    with pytest.raises(InputError, match=words):
        store.claim(OWN, NEEDS, model.blocks)


@pytest.mark.parametrize(
    ("counts", "words"), [({"mixed.Gram": "9"}, "mixed.Gram' is too much"), ({}, "is missing")]
)
def test_files_of_other_sums_are_refused(kept, counts, words):
    model, store = kept
    change(store, counts)
    with pytest.raises(InputError, match=words):
        store.claim(OWN, NEEDS, model.blocks) if counts else store._check(
            model.blocks[0], NEEDS | {Needs.CHANGE}
        )


@pytest.mark.parametrize("need", sorted(NEEDS, key=str))
@pytest.mark.parametrize("value", [-1.0, torch.nan, torch.inf])
def test_sums_of_squares_below_zero_and_what_is_no_number_are_refused(kept, need, value):
    model, store = kept
    name = need.id.replace(".", "__") + ("__0" if need == Needs.HIDDEN_GRAM else "")
    there = load_file(store.folder / "block-00000.safetensors")[name.replace("__", ".")]
    there.view(-1)[0] = value
    change(store, **{name: there})
    store.claim(OWN, NEEDS, model.blocks)
    with pytest.raises(InputError, match=need.kind.__name__):
        store.get(0, [need])


def test_what_another_machine_writes_stays(kept, monkeypatch):
    """On a shared disk; the mistake is to ask this machine about the other one's process."""
    model, store = kept
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    own = platform.node().replace(".", "-").replace("_", "-")
    names = [f"block-00001.{host}.{gone.pid}.partial" for host in (own, "elsewhere")]
    names += [f"block-00001.{own}.{number}.partial" for number in (os.getpid(), "9" * 20, "x")]
    for name in names:
        (store.folder / name).touch()
    store.claim(OWN, NEEDS, model.blocks)
    assert [(store.folder / name).exists() for name in names] == [False, True, True, True, True]


@pytest.mark.parametrize("name", ["identity.json", "block-00000.safetensors"])
def test_folders_in_the_place_of_files_are_refused_by_name(kept, name):
    model, store = kept
    (store.folder / name).unlink()
    (store.folder / name).mkdir()
    with pytest.raises(InputError, match=f"{name}.*no file.*[Rr]emove"):
        store.claim(OWN, NEEDS, model.blocks)
