"""Runs that stop half-way: what they leave, and how they go on."""

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pkgutil import resolve_name

import pytest
from conftest import ROOT, SMALL, sentences

WEIGHTS = "model.safetensors"


def files(folder):
    return sorted(entry.name for entry in folder.iterdir())


def interrupt(*_, **__):
    raise KeyboardInterrupt


def made(out):
    return {name: (out / name).read_bytes() for name in (WEIGHTS, "secateur/plan.json")}


@pytest.fixture
def undisturbed(compress, tmp_path, forget):
    """The bytes of a run that nothing stopped; none of its scores are left."""
    out = tmp_path / "undisturbed" / "out"
    compress(out=out).succeeded()
    forget()
    return made(out)


@pytest.fixture
def stopped(compress, room, monkeypatch, near):
    """A function that interrupts ``compress`` where a module or class calls one of its names."""
    from secateur.pipeline import compress_stage as pipeline

    def stop(name="write", owner=pipeline, after=0, args=()):
        original, calls = getattr(owner, name), []

        def counted(*a, **k):
            calls.append(name)
            if len(calls) > after:
                raise KeyboardInterrupt
            return original(*a, **k)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, counted)
            found = compress(*args)
        assert found.code == 130
        assert "To resume a compress or sweep command, repeat it" in found.err
        assert "Traceback" not in found.err
        assert not (room / "out").exists()
        near.clear()
        return found

    return stop


@pytest.mark.parametrize(
    ("owner", "name", "after"),
    [
        ("pipeline.run_inputs", "measure_in_subprocess", 0),
        ("pipeline.prepare", "calibrate", 0),
        ("pipeline.prepare", "score", 0),
        ("scoring.evidence", "measure_losses", 1),
        ("pipeline.prepare", "keep_evidence", 0),
        ("pipeline.prepare", "make_plan", 0),
        ("apply.sequential:Propagation", "narrow_block", 1),
        ("apply.sequential", "narrow_unit", 3),
        ("apply.save", "write_config", 0),
        ("pipeline.run_record", "measure_in_subprocess", 0),
        ("pipeline.compress", "write_record", 0),
    ],
)
def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(
    undisturbed, stopped, compress, room, near, owner, name, after
):
    stopped(name, resolve_name(f"secateur.{owner}"), after)
    assert files(room) == [".out.partial"]
    compress().succeeded()
    assert made(room / "out") == undisturbed
    assert files(room) == ["out"]
    assert len(near) == (2 if owner == "pipeline.run_inputs" else 1)


def test_files_of_other_times_change_nothing(undisturbed, stopped, compress, room):
    """As a clock that jumps leaves them: the run's own may be of the past and of the future.

    Nothing reads the time of day itself; progress and figures use clocks that only go on.
    """
    stopped("narrow_block", resolve_name("secateur.apply.sequential:Propagation"), after=1)
    times = itertools.cycle([9, 4 * 10**9])
    for path, moment in zip((room / ".out.partial").rglob("*"), times, strict=False):
        os.utime(path, (moment, moment))
    compress().succeeded()
    assert made(room / "out") == undisturbed
    assert files(room) == ["out"]


def test_an_interrupted_run_of_a_method_in_one_pass_gives_the_same_bytes(
    stopped, compress, room, tmp_path, forget
):
    from secateur.apply import sequential as propagate

    compress("--method", "modegpt", out=tmp_path / "undisturbed" / "out").succeeded()
    forget()
    stopped("narrow_block", propagate, after=1, args=["--method", "modegpt"])
    compress("--method", "modegpt").succeeded()
    assert made(room / "out") == made(tmp_path / "undisturbed" / "out")
    assert files(room) == ["out"]


def test_finished_stages_are_not_repeated(stopped, compress, room, monkeypatch, near, forget):
    from secateur.pipeline import prepare

    forget()
    stopped("write")
    kept = files(room / ".out.partial")
    assert {"dense.json", "statistics", "fingerprint.json"} <= set(kept)
    monkeypatch.setattr(prepare, "calibrate", lambda *_: pytest.fail("calibrated again"))
    monkeypatch.setattr(prepare, "score", lambda *_: pytest.fail("scored again"))
    compress().succeeded()
    assert len(near) == 1
    assert "result" in json.loads(near[0])["source"]


def test_a_calibration_cut_short_starts_again(undisturbed, stopped, compress, room):
    from secateur.calibration.collect import Store

    stopped("put", owner=Store, after=1)
    (block,) = (room / ".out.partial" / "statistics").glob("*.safetensors")
    assert block.name == "block-00000.safetensors"
    compress().succeeded()
    assert (room / "out" / WEIGHTS).read_bytes() == undisturbed[WEIGHTS]


def test_a_rest_that_nothing_speaks_for_is_not_used(undisturbed, stopped, compress, room):
    """Killed while its folder was cleared. The mistake: scores of another command, believed."""
    stopped("write", args=["--method", "modegpt"])
    (room / ".out.partial" / "fingerprint.json").unlink()
    compress().succeeded()
    assert made(room / "out") == undisturbed


def test_a_folder_whose_result_has_its_final_name_is_tidied(compress, room):
    """Killed between the last rename and the end of clearing."""
    from secateur.io.run_directory import Workspace

    publish = Workspace.publish

    def killed(workspace):
        publish(workspace)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workspace, "publish", killed)
        assert compress().code == 130
    assert files(room) == [".out.partial", "out"]
    before = made(room / "out")
    compress().refused("exists")
    assert files(room) == ["out"]
    assert made(room / "out") == before


def test_an_overwrite_that_was_killed_behind_its_renames_can_be_typed_again(compress, room):
    """The mistake: the old output, put aside, is in its own way for ever."""
    from secateur.io.run_directory import Workspace

    compress("--keep", 0.9).succeeded()
    publish = Workspace.publish

    def killed(workspace):
        publish(workspace)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workspace, "publish", killed)
        assert compress("--overwrite").code == 130
    assert (room / ".out.partial" / "replaced").is_dir()
    expected = made(room / "out")
    compress("--overwrite").succeeded()
    assert made(room / "out") == expected
    assert files(room) == ["out"]


@pytest.mark.parametrize("left", [["statistics"], ["statistics", "result"], []])
def test_clearing_that_was_killed_is_finished(compress, room, left):
    """What says what the folder is about goes first, so only that it is gone can be told."""
    (room / "out").mkdir()
    for name in left:
        (room / ".out.partial" / name).mkdir(parents=True)
    (room / ".out.partial").mkdir(exist_ok=True)
    (room / ".out.partial" / "lock").touch()
    compress().refused("exists")
    assert files(room) == ["out"]


def test_clearing_does_not_follow_a_link(compress, room, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    (room / "out").mkdir()
    (room / ".out.partial").symlink_to(tmp_path / "mine")
    compress().refused("exists")
    assert files(tmp_path / "mine") == ["file"]


def test_a_read_error_in_a_first_run_leaves_what_it_finished(
    undisturbed, compress, room, near, monkeypatch
):
    """One header of statistics can't be read for once. The mistake: hours of work removed."""
    from secateur.io import safetensors_header as header
    from secateur.pipeline import compress_stage as pipeline

    write, opened = pipeline.write, header.opened

    def failing(path):
        if path.name == "block-00001.safetensors":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return opened(path)

    def bad(*given):
        monkeypatch.setattr(header, "opened", failing)
        return write(*given)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write", bad)
        compress().refused("block-00001", os.strerror(errno.EIO))
    monkeypatch.setattr(header, "opened", opened)
    assert {"dense.json", "statistics"} <= set(files(room / ".out.partial"))
    near.clear()
    compress().succeeded()
    assert len(near) == 1
    assert made(room / "out") == undisturbed


def test_a_text_that_is_away_at_the_end_leaves_what_was_finished(
    compress, room, near, held, monkeypatch
):
    from secateur.pipeline import compress as pipeline
    from secateur.pipeline import compress_stage

    judged, away = pipeline.judge_result, held.with_suffix(".away")

    def gone(*given):
        held.rename(away)
        return judged(*given)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "judge_result", gone)
        compress().refused(held.name)
    away.rename(held)
    assert (room / ".out.partial" / "written.json").exists()
    monkeypatch.setattr(compress_stage, "write", lambda *_: pytest.fail("written again"))
    compress().succeeded()


def test_a_read_error_in_the_midst_of_a_shard_halts_a_streamed_run(
    compress, room, tmp_path, monkeypatch
):
    """A weight of the second block, half read. The run goes on when the disk does."""
    from secateur.io import safetensors_reader as shelf
    from secateur.pipeline import compress_stage as pipeline

    compress("--stream", "on", out=tmp_path / "undisturbed" / "out").succeeded()
    write, fill, calls = pipeline.write, shelf._fill, []

    class Failing:
        def __init__(self, file):
            self.file = file

        def readinto(self, room):
            calls.append(len(room))
            if len(calls) < 12:
                return self.file.readinto(room[: len(room) // 2 or 1])
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def bad(*given):
        monkeypatch.setattr(shelf, "_fill", lambda file, tensor: fill(Failing(file), tensor))
        return write(*given)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write", bad)
        found = compress("--stream", "on")
    monkeypatch.setattr(shelf, "_fill", fill)
    found.refused("cannot be read any more", os.strerror(errno.EIO), "goes on")
    assert len(calls) == 12
    assert files(room) == [".out.partial"]
    compress("--stream", "on").succeeded()
    assert made(room / "out") == made(tmp_path / "undisturbed" / "out")


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def edited(change):
    def edit(path):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit


def tensors_changed(change):
    def edit(path):
        from safetensors.torch import load_file, save_file

        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return edit


def one_dimension(tensors):
    tensors["ids"] = tensors["ids"][0]


def large(tensors):
    tensors["ids"] += 10**6


DAMAGED = {
    "dense.json": [
        lambda path: path.write_text("{}"),
        edited(lambda c: c["measurements"].update(perplexity={})),
        edited(lambda c: c["measurements"].update(bytes=-1)),
        edited(lambda c: c["measurements"].update(bytes=str(c["measurements"]["bytes"]))),
        edited(lambda c: c["measurements"].pop("prompt")),
        edited(lambda c: c["measurements"].update(perplexity={"another": 2.0})),
    ],
    "dense.safetensors": [cut, lambda path: path.write_bytes(b""), lambda path: path.unlink()],
    "written.json": [
        cut,
        lambda path: path.write_text("{}"),
        edited(lambda c: c.update(observed={"errors": 1})),
        edited(lambda c: c.update(seconds={"apply": -1})),
    ],
    "said.safetensors": [
        cut,
        lambda path: path.unlink(),
        tensors_changed(lambda tensors: tensors.update(bogus=tensors["ids"] + 1)),
        tensors_changed(lambda tensors: tensors.update(ids=tensors["ids"].float())),
        tensors_changed(one_dimension),
        tensors_changed(large),
    ],
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_damaged_of_an_unfinished_run_is_made_again(compress, room, near, name):
    """The mistake: it is refused each time, or believed."""
    from secateur.pipeline import compress as pipeline

    for damage in DAMAGED[name]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, "judge_result", interrupt)
            assert compress("--overwrite").code == 130
        before = (room / ".out.partial" / "dense.json").read_text()
        damage(room / ".out.partial" / name)
        near.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, "write_record", interrupt)
            assert compress("--overwrite").code == 130
        assert len(near) == (2 if name.startswith("dense") else 1)
        again, dense = (room / ".out.partial" / "dense.json").read_text(), json.loads(before)
        assert (
            json.loads(again)["measurements"]["perplexity"] == dense["measurements"]["perplexity"]
        )
        compress("--overwrite").succeeded()


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.clear(),
        lambda content: content.update(curves=1),
        lambda content: content["curves"].popitem(),
        lambda content: content.update(curves={name: [] for name in content["curves"]}),
        lambda content: content.update(losses={}),
        lambda content: content.update(reading=[]),
        lambda content: content.update(more=1),
    ],
)
def test_damaged_scores_of_a_block_are_measured_again(undisturbed, stopped, compress, room, change):
    stopped("keep_evidence", resolve_name("secateur.pipeline.prepare"))
    path = room / ".out.partial" / "scores-0.json"
    edited(change)(path)
    compress().succeeded()
    assert made(room / "out") == undisturbed


def test_wrong_input_later_leaves_what_was_finished(stopped, compress, room, monkeypatch):
    """A device that is away for now. The mistake: hours of work removed."""
    from secateur import InputError
    from secateur.pipeline import compress_stage as pipeline

    def away(*_, **__):
        raise InputError("no such device")

    stopped("write")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write", away)
        compress().refused("no such device")
    assert (room / ".out.partial" / "statistics").is_dir()
    compress().succeeded()
    assert files(room) == ["out"]


def test_an_interrupted_overwrite_leaves_the_old_output(compress, room, monkeypatch):
    from secateur.pipeline import compress_stage as pipeline

    compress("--keep", 0.9).succeeded()
    before = (room / "out" / WEIGHTS).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write", interrupt)
        assert compress("--overwrite").code == 130
    assert (room / "out" / WEIGHTS).read_bytes() == before
    compress("--overwrite").succeeded()
    assert (room / "out" / WEIGHTS).read_bytes() != before
    assert files(room) == ["out"]


OTHERS = [  # what differs in a command, and what the refusal says of it
    (("--keep", "0.5"), "budget: keep"),
    (("--seed", "1"), "calibration"),
    (("--samples", "3"), "calibration"),
    (("--eval-windows", "1"), "questions"),
    (("--multiple-of", "4"), "budget: multiple_of"),
    (("--target", "bytes"), "budget: target"),
    (("--tier", "plain"), "another"),
    (("--allocator", "uniform"), "allocator: "),
    (("--cells", "200"), "allocator: cells"),
    (("--iterations", "1"), "method: iterations"),
    (("--dtype", "bfloat16"), "settings"),
]


def test_other_commands_do_not_take_over_an_unfinished_run(stopped, compress, room, near):
    stopped()
    before = files(room / ".out.partial")
    for flags, field in OTHERS:
        value = () if flags[0] in ("--tier", "--allocator") else flags[1:]  # a part differs
        compress(*flags).refused("unfinished", field, *value, "--overwrite")
        assert files(room / ".out.partial") == before, flags
    compress().succeeded()
    assert len(near) == 1


def test_overwrite_starts_another_command_afresh(stopped, compress, room, near):
    stopped()
    compress("--keep", 0.5, "--overwrite").succeeded()
    assert len(near) == 2
    report = json.loads((room / "out" / "secateur" / "report.json").read_text())
    assert report["budget"]["keep"] == 0.5
    assert files(room) == ["out"]


def test_a_changed_text_is_not_answered_from_before(stopped, compress, room, tmp_path, run):
    text = tmp_path / "mine.txt"
    text.write_text(sentences(1, 200))
    stopped(args=["--calibration", text])
    text.write_text(sentences(9, 200))
    again = compress("--calibration", text)
    if again.code:  # refusing is as good as starting afresh
        again.refused("mine.txt", "--overwrite")
        return
    compress("--calibration", text, out=room / "fresh").succeeded()
    assert (room / "out" / WEIGHTS).read_bytes() == (room / "fresh" / WEIGHTS).read_bytes()


def test_a_changed_model_is_not_answered_from_before(
    compress, broken, room, monkeypatch, llama_config, tokenizer
):
    from conftest import save_checkpoint

    from secateur.pipeline import compress_stage as pipeline

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write", interrupt)
        assert compress(source=broken).code == 130
    save_checkpoint(broken, llama_config(), tokenizer, seed=1)
    again = compress(source=broken)
    if again.code:
        again.refused("model", "--overwrite")
        return
    compress(source=broken, out=room / "fresh").succeeded()
    assert (room / "out" / WEIGHTS).read_bytes() == (room / "fresh" / WEIGHTS).read_bytes()
    dense = [
        json.loads((room / name / "secateur" / "report.json").read_text())["dense"]["perplexity"]
        for name in ("out", "fresh")
    ]
    assert dense[0] == dense[1]


def test_a_run_into_its_own_model_folder_goes_on(compress, broken, room, monkeypatch, near):
    """The unfinished folder lies among the model's files then, and is none of them."""
    from secateur.pipeline import compress_stage as pipeline

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write", interrupt)
        assert compress(source=broken, out=broken / "out").code == 130
    near.clear()
    compress(source=broken, out=broken / "out").succeeded()
    assert len(near) == 1


def test_damaged_statistics_are_refused_or_made_again(undisturbed, stopped, compress, room):
    stopped()
    path = room / ".out.partial" / "statistics" / "block-00001.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    found = compress()
    if found.code:
        found.refused()
        compress().succeeded()
    assert (room / "out" / WEIGHTS).read_bytes() == undisturbed[WEIGHTS]


def test_a_second_run_is_refused_while_the_first_works(compress, room, near):
    from secateur.io.run_directory import Workspace

    first = Workspace(room / "out", overwrite=False)
    with first.opened({"mine": 1}):
        (first.folder / "dense.json").write_text("{}")
        compress().refused("another run", "out", "wait")
        compress("--overwrite").refused("another run")
        assert {"dense.json", "result", "lock"} <= set(files(first.folder))
    assert near == []


def test_a_second_run_beside_it_is_welcome(compress, room):
    from secateur.io.run_directory import Workspace

    with Workspace(room / "other", overwrite=False).opened({}):
        compress().succeeded()


def test_a_failed_run_frees_its_output(compress, room):
    compress("--keep", 0.001, "--tier", "plain").refused("out of reach")
    compress().succeeded()
    assert files(room) == ["out"]


KILLED = """
import os, signal, sys
from pathlib import Path
from types import SimpleNamespace
from secateur.pipeline import compress_stage as pipeline
from secateur.evaluate import evaluator

def call(command, **_):
    return SimpleNamespace(returncode=evaluator.main(Path(command[-2]), Path(command[-1])))

evaluator.subprocess = SimpleNamespace(DEVNULL=None, run=call)
pipeline.write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
from secateur.cli.main import main
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_killed_run_goes_on(undisturbed, compress, model, text, held, room, near):
    given = [model, room / "out", "--calibration", text, "--eval", held, *SMALL]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, "compress", *map(str, given)], cwd=ROOT, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert files(room) == [".out.partial"]
    assert files(room / ".out.partial" / "statistics")
    near.clear()
    compress().succeeded()
    assert len(near) == 1
    assert made(room / "out") == undisturbed
    assert files(room) == ["out"]


@pytest.mark.skipif(sys.platform == "win32", reason="no process groups")
def test_ctrl_c_shows_no_traceback(model, text, held, room):
    """The terminal interrupts the measuring process too; neither may print a traceback."""
    given = [model, room / "out", "--calibration", text, "--eval", held, *SMALL]
    running = subprocess.Popen(
        [sys.executable, "-m", "secateur", "compress", *map(str, given)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
        # A job in a shell's background ignores interruptions, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert running.stderr is not None
    assert "measuring" in running.stderr.readline()
    time.sleep(1.5)
    os.killpg(running.pid, signal.SIGINT)
    err = running.stderr.read()
    assert running.wait() == 130
    assert "To resume a compress or sweep command, repeat it" in err
    assert "Traceback" not in err
    assert files(room) == [".out.partial"]
