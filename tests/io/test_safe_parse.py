"""What is left of a killed run, and statistics: read like files of strangers."""

import json
import time

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from secateur import Store
from secateur.calibration.needs import Needs
from secateur.io.run_directory import UnfinishedRunError, Workspace, difference, write_whole
from secateur.io.safe_parse import HostileError, parse_json, parse_yaml
from secateur.io.safetensors_writer import PendingTensor, WriterState
from secateur.methods.auto import Auto
from secateur.planning.plan import Plan, read_plan
from secateur.report.run_records import PlanRows
from secateur.scoring.evidence import Scores
from secateur.utils.errors import InputError, printable, shown, words


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "out", overwrite=False)


@pytest.mark.parametrize("inside", ["", "result", "narrowing/shard-0.data"])
def test_nothing_is_written_through_links_in_place_of_a_runs_folder(workspace, tmp_path, inside):
    (tmp_path / "elsewhere").mkdir()
    link = workspace.folder / inside if inside else workspace.folder
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="is a link"), workspace.opened({"a": 1}):
        pass
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert link.is_symlink()


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1, "a": 2}', "[" * 5000])
def test_a_damaged_record_of_an_unfinished_run_stays_unless_overwritten(tmp_path, content):
    folder = Workspace(tmp_path / "out", False).folder
    folder.mkdir()
    (folder / "fingerprint.json").write_text(content)
    (folder / "dense.json").write_text("{}")
    with (
        pytest.raises(UnfinishedRunError, match="--overwrite"),
        Workspace(tmp_path / "out", False).opened({"a": 1}),
    ):
        pass
    assert (folder / "dense.json").exists()
    with Workspace(tmp_path / "out", True).opened({"a": 1}):
        assert not (folder / "dense.json").exists()


def test_a_damaged_stage_is_computed_again_and_a_wrecked_model_has_one(workspace):
    workspace.folder.mkdir()
    (workspace.folder / "dense.json").write_text('{"perplexity": ')
    wrecked = {"perplexity": float("inf")}
    assert workspace.stage("dense", lambda: wrecked, dict) == wrecked
    assert workspace.stage("dense", dict, dict) == wrecked


def test_a_stage_that_does_not_hold_is_computed_again(workspace):
    """The mistake: what was kept is used as it is."""
    workspace.folder.mkdir()

    def held(content):
        if "a" not in content:
            raise InputError("a is missing")
        return content["a"]

    assert workspace.stage("b", lambda: {"a": 1}, held) == 1
    (workspace.folder / "b.json").write_text('{"c": 1}')
    assert workspace.stage("b", lambda: {"a": 2}, held) == 2
    assert workspace.stage("b", dict, held) == 2


def test_an_entry_that_is_missing_differs_from_one_that_is_null():
    assert difference("a", {"a": {"b": None}}, {"a": {}}) == ("a: b", None, None)


def test_a_file_is_not_written_through_a_link_of_its_passing_name(tmp_path, monkeypatch):
    monkeypatch.setattr("os.getpid", lambda: 7)
    (tmp_path / ".a.json.7.partial").symlink_to(tmp_path / "elsewhere")
    write_whole(tmp_path / "a.json", "1")
    assert (tmp_path / "a.json").read_text() == "1"
    assert not (tmp_path / "elsewhere").exists()


WHOLE = {"dtype": "F32", "shape": (2, 3), "start": 0, "length": 24, "itemsize": 4}


@pytest.mark.parametrize(
    "change",
    [
        {"length": 2**40},
        {"shape": (2**40, 3)},
        {"shape": (-2, -3)},
        {"start": -8},
        {"start": 2**50},
        {"dtype": "X"},
        {"itemsize": 8},
        {},
    ],
)
def test_what_a_journal_says_of_unfinished_shards_must_be_possible(change):
    place = PendingTensor(**WHOLE | change)
    found = {"pending": {"a": place}, "size": 24, "shards": [], "written": 24}
    if change:
        with pytest.raises(ValueError, match=r"a|size"):
            WriterState(**found)
        return
    assert WriterState(**found).pending == {"a": place}
    with pytest.raises(ValueError, match="size"):
        WriterState(**found | {"pending": {}})


@pytest.mark.parametrize(
    ("tensors", "counts", "said"),
    [
        ({"hidden.Gram.0": torch.ones(2, 2)}, {"hidden.Gram": "9"}, "no sum"),
        ({"x": torch.ones(2)}, {"hidden.Gram": "9"}, "missing"),
        ({"hidden.Gram.0": torch.ones(2, 2).double()}, {"hidden.Gram": "9" * 5000}, "tokens"),
        ({"hidden.Gram.0": torch.ones(2, 2).double()}, {"hidden.Gram": "-1"}, "tokens"),
    ],
)
def test_statistics_that_are_none_are_refused(tmp_path, tensors, counts, said):
    save_file(tensors, tmp_path / "block-00000.safetensors", metadata=counts)
    store = Store(tmp_path)
    assert 0 in store
    with pytest.raises(InputError, match=said):
        store.get(0, [Needs.HIDDEN_GRAM])


def test_damaged_statistics_are_as_if_they_were_not_there(tmp_path):
    (tmp_path / "block-00000.safetensors").write_bytes(b"\xff" * 100)
    assert 0 not in Store(tmp_path)


def test_whose_statistics_they_are_is_read_with_limits(tmp_path):
    own = {"model": "a"}
    Store(tmp_path).claim(own, Auto().needs)
    path = tmp_path / "identity.json"
    for content in ("[" * 9999, json.dumps({"model": "\x1b" * 9999}), '{"model": NaN}'):
        path.write_text(content)
        with pytest.raises(InputError) as refused:
            Store(tmp_path).claim(own, Auto().needs)
        assert len(str(refused.value)) < 1000
        assert "\x1b" not in str(refused.value)


def test_messages_repeat_a_part_of_what_they_are_about():
    assert len(shown(["x" * 10_000] * 10_000)) < 300
    assert shown({"b": 1, "a": [2]}) == "{'b': 1, 'a': [2]}"
    assert words("a\n\x1b[2Jb") == "a \\x1b[2Jb"
    assert len(words("x" * 10_000)) < 300
    assert printable("é\n\u202e\x07") == "é\n\\u202e\\x07"


def test_names_by_the_thousand_with_one_twice_take_no_time():
    names = [f"n{number}" for number in range(18_000)]
    start = time.process_time()
    with pytest.raises(HostileError, match="'n7' is there twice"):
        parse_yaml(f"{{{','.join([*names, 'n7'])}}}".encode())
    assert time.process_time() - start < 15


@pytest.mark.parametrize("piece", ["[],", "{},"])
def test_lists_of_nothing_by_the_million_are_not_made(tmp_path, piece):
    path = tmp_path / "plan.json"
    path.write_text('{"units": [' + piece * 800_000 + "1]}")
    with pytest.raises(InputError, match="more than 1048576 values"):
        read_plan(path)


def test_of_many_faults_the_first_is_enough():
    """A fault of every part takes gigabytes. The mistake: all are collected, and one is shown."""
    for kind, content in (
        (Plan, {"units": [{}] * 1000}),
        (Scores, {"curves": {"a": [[]] * 1000}}),
        (Scores, {"curves": {str(n): 1 for n in range(70_000)}}),
        (PlanRows, {"units": [{}] * 1000}),
    ):
        with pytest.raises(ValidationError) as refused:
            kind.model_validate(content)
        assert refused.value.error_count() < 30


def test_a_header_is_read_once_for_all_that_is_asked(tmp_path, monkeypatch):
    sums = {"hidden.Gram.0": torch.ones(2, 2).double(), "query.Energy": torch.ones(2).double()}
    counts = {"hidden.Gram": "9", "query.Energy": "9"}
    save_file(sums, tmp_path / "block-00000.safetensors", metadata=counts)
    parsed = []
    monkeypatch.setattr(
        "secateur.io.safetensors_header.parse_json", lambda raw: parsed.append(1) or parse_json(raw)
    )
    assert len(Store(tmp_path).get(0, [Needs.HIDDEN_GRAM, Needs.QUERY_ENERGY])) == 2
    assert len(parsed) == 1
