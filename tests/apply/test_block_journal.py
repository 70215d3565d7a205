"""A run that goes on behind its finished blocks writes what an undisturbed one writes."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur import Budget, Calibration, Settings, Store, calibrate, make_plan, open_model
from secateur.apply.block_journal import Journal
from secateur.evaluate import verify
from secateur.io.run_directory import Workspace, on_disk
from secateur.io.safetensors_reader import TensorReader
from secateur.io.safetensors_writer import Writer
from secateur.methods import method_class
from secateur.models.streamed_loading import open_streamed
from secateur.pipeline.compress_stage import write
from secateur.pipeline.context import RunContext
from secateur.scoring.evidence import score
from secateur.structure.selection import Selection
from secateur.utils.errors import HaltedError, InputError
from tests.support import families
from tests.support.steps import prepared_of

CPU = Settings(device="cpu", dtype="float32")
CASES = [
    *(
        (method, "llama")
        for method in ("auto", "modegpt", "flap", "shortgpt", "replace", "svd-llm")
    ),
    ("auto", "gpt2"),
    ("auto", "phi3_partial"),
    ("wanda-sp", "opt"),
    ("rtn", "llama"),
]


def prepared(folder, method, streams, tokens):
    model = open_streamed(str(folder), CPU) if streams else open_model(folder, CPU)
    store = Store()
    calibrate(model, tokens, method.needs | method.allocator.needs, store)
    evidence = score(model, method, store, tokens)
    budget = Budget(keep=None if method.name == "rtn" else 0.7)
    plan = make_plan(model, method, evidence, Calibration(), tokens, budget=budget, store=store)
    data = SimpleNamespace(tokens=tokens, store=store)
    return prepared_of(model, data, plan, method, evidence)


def written(folder):
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.suffix in (".safetensors", ".json") and path.name != "journal.json"
    }


class Stop(Exception):
    pass


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(("name", "variant"), CASES)
def test_going_on_gives_the_same_bytes(dense, tmp_path, monkeypatch, name, variant, streams):
    """Stopped behind every block in turn; the mistakes: states or weights of before are rounded."""
    kind, tokens = method_class(name), families.read(variant, 6, 32)
    method = kind(group="0") if name == "rtn" else kind()

    def run(folder, stops=()):
        for stop in (*stops, None):
            given = prepared(dense(variant), method, streams, tokens)
            seen = 0
            record = Journal.record

            def recorded(journal, block, record=record, stop=stop):
                nonlocal seen
                record(journal, block)
                seen += 1
                if stop is not None and seen > stop:
                    raise Stop

            with monkeypatch.context() as patch:
                patch.setattr(Journal, "record", recorded)
                try:
                    said = write(given, folder / "out", RunContext(), folder / "narrowing")
                except Stop:
                    continue
            return given, said
        raise AssertionError

    (plain, expected), (gone_on, said) = run(tmp_path / "a"), run(tmp_path / "b", (0, 0))
    assert written(tmp_path / "b" / "out") == written(tmp_path / "a" / "out")
    assert gone_on.observed == plain.observed
    assert said.said.keys() == expected.said.keys()
    for key, tensor in expected.said.items():
        torch.testing.assert_close(said.said[key], tensor, rtol=0, atol=0)


def test_what_was_written_later_is_forgotten(tmp_path):
    """Killed between a shard and its entry in the journal."""
    first = Writer(tmp_path, shard_bytes=100)
    first.add("a", torch.ones(16))
    state = first.state()
    first.add("b", torch.ones(16))  # flushes a
    first.add("c", torch.ones(16))  # flushes b
    again = Writer(tmp_path, shard_bytes=100)
    assert again.go_on(state)
    for name in "bc":
        again.add(name, torch.full((16,), 2.0))
    again.finish()
    again.settle()
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files[-1] == "model.safetensors.index.json"
    assert len(files) == 4
    found = {k: v for f in files[:3] for k, v in load_file(tmp_path / f).items()}
    assert {name: float(t[0]) for name, t in found.items()} == {"a": 1.0, "b": 2.0, "c": 2.0}


def test_killed_between_the_last_renames(tmp_path):
    """Shards that have their final names already are taken back."""
    first = Writer(tmp_path, shard_bytes=100)
    for name in "abc":
        first.add(name, torch.ones(16))
    state = first.state()
    first.finish()
    assert (tmp_path / "model-00001-of-00003.safetensors").exists()
    again = Writer(tmp_path, shard_bytes=100)
    assert again.go_on(state)
    again.finish()
    again.settle()
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert not list(tmp_path.glob("shard*"))


def test_a_result_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """The mistake: a rename that outlives a power cut, and files that don't."""
    workspace, done, there = Workspace(tmp_path / "out", overwrite=False), [], []

    def noted(descriptor):
        done.append(os.fstat(descriptor).st_ino)
        there.append((tmp_path / "out").exists())

    monkeypatch.setattr(os, "fsync", noted)
    with workspace.opened({"a": 1}):
        for name in ("config.json", "secateur/report.json"):
            (workspace.result / name).parent.mkdir(exist_ok=True)
            (workspace.result / name).write_text("{}")
        workspace.publish()
    whole = [tmp_path / "out", *(tmp_path / "out").rglob("*")]
    assert sorted(done) == sorted(path.stat().st_ino for path in whole)
    assert not any(there)


def test_a_result_with_files_that_may_only_be_read_is_published(tmp_path, monkeypatch):
    """As copies of a read-only installation are. The mistake: they are opened to be written."""
    workspace, asked, open_ = Workspace(tmp_path / "out", overwrite=False), [], os.open

    def noted(path, flags, *given, **named):
        asked.append(flags)
        return open_(path, flags, *given, **named)

    with workspace.opened({"a": 1}):
        (workspace.result / "config.json").write_text("{}")
        (workspace.result / "config.json").chmod(0o444)
        monkeypatch.setattr(os, "open", noted)  # who runs as root may write all the same
        on_disk(workspace.result)
        monkeypatch.undo()
        workspace.publish()
    assert len(asked) == 2
    assert not any(flags & (os.O_WRONLY | os.O_RDWR) for flags in asked)


def test_a_block_that_cannot_be_given_back_is_narrowed_again(dense, tmp_path):
    """As the message says. The mistake: it is refused each time."""
    folder = tmp_path / "narrowing"
    journal = Journal(folder, Writer(tmp_path / "out"), {})
    model = open_model(dense("llama"), CPU)
    journal.record(model.blocks[0])
    path = folder / "journal.json"
    content = json.loads(path.read_text())
    content["blocks"][0]["linears"] = {"mlp.none": {"out": 1, "in": 1, "bias": False}}
    path.write_text(json.dumps(content))
    again = Journal(folder, Writer(tmp_path / "out"), {})
    assert again.done == 1
    with pytest.raises(InputError, match=r"block 0.*afresh"):
        again.restore(model, model.blocks[0])
    assert Journal(folder, Writer(tmp_path / "out"), {}).done == 0


ROW = {"ids": torch.ones(1, 4, dtype=torch.int64), "mask": torch.ones(1, 4, dtype=torch.bool)}
LOGITS = {"logits.float32.eager": torch.ones(4, 8)}


@pytest.mark.parametrize(
    "content",
    [
        ROW,
        LOGITS,
        ROW | LOGITS | {"bogus": torch.ones(1)},
        ROW | {"logits.load.eager": torch.ones(4, 8)},
        ROW | LOGITS | {"greedy.cached": torch.ones(3)},
        ROW | LOGITS | {"ids": torch.ones(1, 4)},
        ROW | LOGITS | {"ids": torch.ones(4, dtype=torch.int64)},
        ROW | LOGITS | {"ids": -torch.ones(1, 4, dtype=torch.int64)},
    ],
)
def test_a_testimony_that_says_nothing_is_refused(tmp_path, content):
    """The mistake: an empty one agrees with every model."""
    save_file(content, tmp_path / "said.safetensors")
    with pytest.raises(InputError, match="reference_outputs"):
        verify.ReferenceOutputs.load(tmp_path / "said.safetensors")
    assert verify.disagreement({}, LOGITS) is not None


@pytest.mark.parametrize("lost", ["data", "states", "journal", "sizes"])
def test_what_is_damaged_starts_again(tmp_path, lost):
    """Never half of one run and half of another."""
    (tmp_path / "out").mkdir()
    writer = Writer(tmp_path / "out")
    journal = Journal(tmp_path / "narrowing", writer, {"a": 1})
    writer.add("x", torch.ones(4))
    kept = Selection({})
    kept.save(tmp_path / "narrowing")
    content = {
        "sizes": {"a": 1},
        "blocks": [],
        "errors": [],
        "streams": {"narrow": 4},
        "streamed": False,
        "given": None,
        "kept": kept.digest,
    }
    content["writer"] = writer.state().model_dump(mode="json")
    content["blocks"] = [{"gone": True, "linears": {}, "attention": None, "forms": {}}]
    states = tmp_path / "narrowing" / "narrow-1.states"
    states.write_bytes(b"0000")
    path = tmp_path / "narrowing" / "journal.json"
    path.write_text(json.dumps(content))
    assert journal.done == 0
    assert Journal(tmp_path / "narrowing", Writer(tmp_path / "out"), {"a": 1}).done == 1
    if lost == "data":
        (tmp_path / "out" / "shard-0.data").write_bytes(b"")
    elif lost == "states":
        states.unlink()
    elif lost == "journal":
        path.write_text(path.read_text()[:-20])
    sizes = {"a": 2 if lost == "sizes" else 1}
    again = Journal(tmp_path / "narrowing", Writer(tmp_path / "out"), sizes)
    assert again.done == 0
    assert not list((tmp_path / "out").iterdir())


def test_a_shard_that_disappears_or_ends_early_halts_the_run(dense, tmp_path):
    folder = families.save(families.random_model("llama"), tmp_path / "model")
    model = open_streamed(str(folder), CPU)
    (file,) = folder.glob("*.safetensors")
    whole = file.read_bytes()
    for damage in (lambda: file.write_bytes(whole[: len(whole) // 4]), file.unlink):
        damage()
        with pytest.raises(HaltedError, match=r"cannot be read any more.*goes on"):
            for _ in model.in_turn():
                pass
        file.write_bytes(whole)
    assert len([*model.in_turn()]) == len(model.blocks)


def test_two_files_with_one_tensor_are_refused(tmp_path):
    for name in ("a", "b"):
        save_file({"w": torch.ones(2), name: torch.ones(2)}, tmp_path / f"{name}.safetensors")
    index = {name: f"{name}.safetensors" for name in ("a", "b")}
    content = json.dumps({"weight_map": {**index, "w": "a.safetensors"}})
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError, match="both"):
        TensorReader("m", tmp_path)
