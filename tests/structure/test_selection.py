"""Selections on disk, and what is refused of one that does not fit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur.structure.selection import Selection, file_name
from secateur.structure.units import MLP, QueryKey, ValueOutput
from secateur.utils.errors import InputError

UNITS = {
    "layers.0.mlp": MLP("layers.0.mlp", 0, 12, 4, 8, producers=2, biased_producers=0),
    "layers.0.query_key": QueryKey(
        "layers.0.query_key",
        0,
        8,
        2,
        8,
        heads=2,
        kv_heads=2,
        query_bias=False,
        key_bias=False,
        rotary=True,
    ),
    "layers.0.value_output": ValueOutput(
        "layers.0.value_output",
        0,
        8,
        1,
        8,
        heads=2,
        kv_heads=2,
        value_bias=False,
        output_bias=False,
    ),
}
MLP_NAME, PAIRS, VALUES = UNITS


def made(**changes):
    kept = {
        MLP_NAME: torch.tensor([0, 3, 4, 11]),
        PAIRS: torch.tensor([[0, 2, 4, 6], [1, 3, 5, 7]]),
    }
    return Selection({**kept, **changes})


def sizes(selection):
    return {name: unit.size for name, unit in UNITS.items()} | selection.sizes


def test_it_comes_back_from_its_file(tmp_path):
    selection = made()
    path = selection.save(tmp_path)
    assert path.name == file_name(selection.digest)
    found = Selection.load(tmp_path, selection.digest)
    assert found == selection
    for name, kept in selection.kept.items():
        assert torch.equal(found.kept[name], kept)


def test_an_empty_one_and_an_empty_unit_come_back(tmp_path):
    for selection in (Selection({}), made(**{MLP_NAME: torch.tensor([], dtype=torch.int64)})):
        selection.save(tmp_path)
        assert Selection.load(tmp_path, selection.digest) == selection


def test_the_digest_is_of_names_shapes_and_indices_alone():
    kept = made().kept
    turned = Selection({n: kept[n].to(torch.int32) for n in reversed(kept)})
    assert turned == made()
    assert hash(turned) == hash(made())
    flat = made(**{PAIRS: kept[PAIRS].flatten()})
    moved = made(**{MLP_NAME: torch.tensor([0, 3, 5, 11])})
    named = Selection({name + "x": indices for name, indices in kept.items()})
    assert len({s.digest for s in (made(), flat, moved, named)}) == 4


def test_it_is_its_own(tmp_path):
    given = torch.tensor([0, 1])
    selection = Selection({MLP_NAME: given})
    given[1] = 5
    assert selection.kept[MLP_NAME].tolist() == [0, 1]


def test_a_whole_one_is_accepted():
    made().check(UNITS, sizes(made()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({MLP_NAME: torch.tensor([0, 3, 4, 12])}, "out of range"),
        ({MLP_NAME: torch.tensor([-1, 3, 4, 5])}, "out of range"),
        ({MLP_NAME: torch.tensor([0, 3, 3, 5])}, "twice"),
        ({MLP_NAME: torch.tensor([3, 0, 4, 5])}, "ascending"),
        ({MLP_NAME: torch.tensor([[0, 3, 4, 5]])}, "shape"),
        ({PAIRS: torch.tensor([[0, 2, 4, 6]])}, "shape"),
        ({PAIRS: torch.tensor([[0, 2, 4, 4], [1, 3, 5, 7]])}, "twice"),
        ({VALUES: torch.tensor([0, 1])}, "no indices"),
        ({"layers.0.mlq": torch.tensor([0])}, "Did you mean 'layers.0.mlp'"),
        ({MLP_NAME: torch.arange(12)}, "keeps its size"),
    ],
)
def test_indices_that_do_not_fit_are_refused(changes, message):
    selection = made(**changes)
    with pytest.raises(InputError, match=message):
        selection.check(UNITS, sizes(selection))


def test_another_size_than_the_plans_is_refused():
    with pytest.raises(InputError, match=r"the size is 8.*keeps 4.*back to 4.*`selection` to null"):
        made().check(UNITS, sizes(made()) | {MLP_NAME: 8})


def damage(path, how):
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-3])
    elif how == "text":
        path.write_text("no tensors")
    elif how == "floats":
        save_file({n: t.double() for n, t in load_file(path).items()}, path)
    elif how == "deep":
        save_file({n: t.view(1, 1, -1) for n, t in load_file(path).items()}, path)
    elif how == "moved":
        content = load_file(path)
        content[MLP_NAME] = content[MLP_NAME] + 1
        save_file(content, path)
    else:
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize("how", ["missing", "cut", "text", "floats", "deep", "moved", "folder"])
def test_a_damaged_file_is_named(tmp_path, how):
    selection = made()
    path = selection.save(tmp_path)
    damage(path, how)
    with pytest.raises(InputError) as caught:
        Selection.load(tmp_path, selection.digest)
    assert str(path) in str(caught.value)
    if how == "moved":
        assert "not the one that the plan names" in str(caught.value)


def test_a_header_that_promises_more_than_there_is_takes_no_memory(tmp_path):
    selection = made()
    path = selection.save(tmp_path)
    header = {MLP_NAME: {"dtype": "I64", "shape": [2**40], "data_offsets": [0, 2**43]}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(InputError, match="corrupt or cut short"):
        Selection.load(tmp_path, selection.digest)
