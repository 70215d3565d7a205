"""The output folder: what is there stays, and what fails leaves nothing."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import WEIGHTS


def test_an_existing_output_is_not_touched_unasked(compress, room, near):
    (room / "out").mkdir()
    (room / "out" / "mine.txt").write_text("mine")
    compress().refused("out", "exists", "--overwrite")
    assert (room / "out" / "mine.txt").read_text() == "mine"
    assert [entry.name for entry in room.iterdir()] == ["out"]
    assert near == []


def test_overwrite_replaces_the_whole_output(compress, room):
    compress("--keep", 0.9).succeeded()
    (room / "out" / "old.txt").write_text("old")
    compress("--overwrite").succeeded()
    assert not (room / "out" / "old.txt").exists()
    assert json.loads((room / "out/secateur/report.json").read_text())["budget"]["keep"] == 0.8
    assert [entry.name for entry in room.iterdir()] == ["out"]


def test_a_failed_overwrite_leaves_the_old_output(compress, room):
    compress("--keep", 0.9).succeeded()
    before = (room / "out" / WEIGHTS).read_bytes()
    compress("--overwrite", "--keep", 0.001, "--tier", "plain").refused("out of reach")
    assert (room / "out" / WEIGHTS).read_bytes() == before
    assert [entry.name for entry in room.iterdir()] == ["out"]


def test_a_failed_rename_leaves_the_old_output(compress, room, monkeypatch):
    compress("--keep", 0.9).succeeded()
    before = (room / "out" / WEIGHTS).read_bytes()
    rename = Path.rename

    def fail(self, target):
        if self.name == "result":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    compress("--overwrite").refused("Input/output error")
    assert (room / "out" / WEIGHTS).read_bytes() == before


def test_overwrite_never_deletes_the_model(compress, model, room):
    inside = Path(shutil.copytree(model, room / "all" / "model"))
    compress("--overwrite", source=inside, out=room / "all").refused("model", "all")
    assert (inside / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()


def test_the_parent_of_the_output_is_made(compress, room):
    compress(out=room / "a" / "b" / "out").succeeded()
    assert (room / "a" / "b" / "out" / WEIGHTS).exists()


def test_a_failed_run_leaves_no_parent_either(compress, room):
    unreachable = ("--keep", 0.001, "--tier", "plain")
    compress(*unreachable, out=room / "a" / "b" / "out").refused("out of reach")
    assert list(room.iterdir()) == []


def test_an_output_below_a_file_is_refused(compress, room):
    (room / "file").write_text("mine")
    compress(out=room / "file" / "out").refused("file")
    assert (room / "file").read_text() == "mine"
    assert [entry.name for entry in room.iterdir()] == ["file"]


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_an_output_in_a_locked_folder_is_refused(compress, room):
    room.chmod(0o555)
    try:
        compress().refused("out", "permission")
    finally:
        room.chmod(0o755)


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_while_weights_are_written(compress, room, monkeypatch):
    """What is finished stays, and nothing under a final name; with room made it goes on."""
    from secateur.io import safetensors_writer as writer

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_copy", full)
        compress().refused("No space left", "repeat it")
    assert [entry.name for entry in room.iterdir()] == [".out.partial"]
    compress().succeeded()
    assert [entry.name for entry in room.iterdir()] == ["out"]


def test_a_full_disk_while_the_plan_is_written(compress, room, monkeypatch):
    opened = Path.open

    def open_file(self, mode="r", *args, **kwargs):
        if "plan.json" in self.name and mode == "x":
            full()
        return opened(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_file)
    compress().refused("No space left", "repeat it")
    assert [entry.name for entry in room.iterdir()] == [".out.partial"]


@pytest.mark.parametrize("old", [None, "old"])
def test_a_plan_that_does_not_fit_leaves_what_was_there(run, model, text, room, monkeypatch, old):
    path = room / "plan.json"
    if old is not None:
        path.write_text(old)
    given = ["--calibration", text, "--samples", 4, "--length", 32, "--overwrite"]
    run("plan", model, *given, "--dry-run").succeeded()  # then the plan is all there is to write
    monkeypatch.setattr(Path, "replace", full)  # what is written has another name until then
    run("plan", model, *given, "-o", path).refused("No space left")
    assert {p.name: p.read_text() for p in room.iterdir()} == ({"plan.json": old} if old else {})


def test_a_plan_file_that_cannot_be_written_is_refused_first(run, model, text, room, monkeypatch):
    from secateur.pipeline import prepare

    given = ["--calibration", text, "--samples", 4, "--length", 32]
    monkeypatch.setattr(prepare, "prepare", lambda *_, **__: pytest.fail("worked for nothing"))
    run("plan", model, *given, "-o", room / "nowhere" / "p.json").refused("nowhere")


@pytest.fixture(params=[8, 32, 56, 80, 120, 180, 240])
def small_disk(request, tmp_path):
    """A real file system of some kilobytes, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={request.param}k", "tmpfs", str(folder)]
    if not sys.platform.startswith("linux") or not shutil.which("mount"):
        pytest.skip("no tmpfs here")
    if subprocess.run(["mount", *options], capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_too_small_for_the_run(compress, small_disk):
    """What is finished stays for when there is more, and none of it has a final name."""
    compress(out=small_disk / "out").refused("space")
    assert [entry.name for entry in small_disk.iterdir()] == [".out.partial"]


def test_a_wrong_reload_is_no_result(compress, room, monkeypatch):
    from safetensors.torch import load_file, save_file

    from secateur.pipeline import run_record as pipeline

    judge = pipeline.measure_in_subprocess

    def corrupted(source, *given, said=None, **named):
        if said is not None:
            tensors = load_file(Path(source) / WEIGHTS)
            tensors["model.layers.1.mlp.down_proj.weight"][0] += 1
            save_file(tensors, Path(source) / WEIGHTS, metadata={"format": "pt"})
        return judge(source, *given, said=said, **named)

    monkeypatch.setattr(pipeline, "measure_in_subprocess", corrupted)
    found = compress()
    assert found.code not in (0, 2)
    assert "is not the model that was compressed" in found.err
    assert "Traceback" not in found.err
    assert list(room.iterdir()) == []


def test_a_crashed_measuring_process_is_reported(compress, room, monkeypatch, near):
    from types import SimpleNamespace

    from secateur.evaluate import evaluator

    killed = SimpleNamespace(DEVNULL=None, run=lambda *_, **__: SimpleNamespace(returncode=-9))
    monkeypatch.setattr(evaluator, "subprocess", killed)
    found = compress()
    assert found.code == 2
    assert "killed" in found.err
    assert "Traceback" not in found.err
    assert [entry.name for entry in room.iterdir()] == [".out.partial"]  # it goes on from there


def test_an_output_that_appears_meanwhile_is_not_replaced(compress, room, monkeypatch):
    from secateur.pipeline import compress_stage as pipeline

    write = pipeline.write

    def late(*args, **kwargs):
        (room / "out").mkdir()
        (room / "out" / "config.json").write_text("theirs")
        return write(*args, **kwargs)

    monkeypatch.setattr(pipeline, "write", late)
    compress().refused("appeared")
    assert (room / "out" / "config.json").read_text() == "theirs"
