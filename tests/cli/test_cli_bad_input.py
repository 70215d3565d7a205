"""Whatever is wrong with the input: one message, exit code 2, and nothing left behind."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMALL

WEIGHTS = "model.safetensors"


def remove(name):
    return lambda folder: (folder / name).unlink()


def tensors_changed(change):
    def damage(folder):
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def truncate(folder):
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size // 2)


def garbage(folder):
    (folder / WEIGHTS).write_bytes(bytes(range(256)) * 100)


def empty(folder):
    (folder / WEIGHTS).write_bytes(b"")


def config_changed(**changes):
    def damage(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def broken_config(folder):
    (folder / "config.json").write_text('{"model_type": "llama",')


def no_tokenizer(folder):
    for path in folder.glob("*token*"):
        path.unlink()


def broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


def longer_tokenizer(folder):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    added = content["added_tokens"][0] | {"id": 320, "content": "<extra>"}
    content["added_tokens"].append(added)
    path.write_text(json.dumps(content))


DAMAGES = {
    "no config": (remove("config.json"), ["broken", "config.json"]),
    "no weights": (remove(WEIGHTS), ["broken", WEIGHTS]),
    "truncated": (truncate, ["broken", "corrupt or cut short", "again"]),
    "garbage": (garbage, ["broken", "corrupt or cut short", "again"]),
    "empty weights": (empty, ["broken", "corrupt or cut short", "again"]),
    "missing tensor": (
        tensors_changed(lambda t: t.pop("model.layers.1.mlp.down_proj.weight")),
        ["broken", "missing", "model.layers.1.mlp.down_proj.weight", "again"],
    ),
    "nan": (
        tensors_changed(lambda t: t["model.layers.0.mlp.up_proj.weight"].fill_(float("nan"))),
        ["broken", "model.layers.0.mlp.up_proj.weight", "NaN"],
    ),
    "inf": (
        tensors_changed(lambda t: t["model.norm.weight"][:1].fill_(float("inf"))),
        ["broken", "model.norm.weight", "infinite"],
    ),
    "other shapes": (config_changed(intermediate_size=72), ["broken"]),
    "odd heads": (config_changed(num_attention_heads=5), ["broken"]),
    "text for a number": (config_changed(hidden_size="wide"), ["broken"]),
    "unknown model_type": (config_changed(model_type="lama"), ["broken", "lama"]),
    "unknown family": (config_changed(model_type="mamba"), ["mamba", "gpt_neox", "inspect"]),
    "no language model": (config_changed(model_type="t5"), ["t5"]),
    "broken config": (broken_config, ["broken"]),
    "no tokenizer": (no_tokenizer, ["broken", "tokenizer"]),
    "broken tokenizer": (broken_tokenizer, ["broken", "tokenizer"]),
    "longer tokenizer": (longer_tokenizer, ["broken", "320", "tokenizer"]),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_broken_model_is_refused(compress, broken, room, name):
    damage, words = DAMAGES[name]
    damage(broken)
    compress(source=broken).refused(*words)
    assert list(room.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["no config", "broken config", "odd heads", "text for a number", "no language model"]
)
def test_inspect_of_a_broken_config_is_refused(run, broken, name):
    DAMAGES[name][0](broken)
    run("inspect", broken).refused("broken")


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c", "~/no/such/folder"])
def test_a_missing_folder_is_refused(compress, room, name):
    compress(source=name).refused(name, "no such folder")
    assert list(room.iterdir()) == []


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no-such-model", "not a name"])
def test_an_unreachable_hub_id_is_refused(compress, room, name):
    compress(source=name).refused(f"'{name}'")
    assert list(room.iterdir()) == []


@pytest.mark.parametrize("command", ["inspect", "plan", "eval"])
def test_every_command_refuses_a_missing_model(run, near, command):
    run(command, "./nowhere").refused("./nowhere", "no such folder")


def test_a_file_is_no_model(compress, text, room):
    compress(source=text).refused(text.name)
    assert list(room.iterdir()) == []


def test_a_broken_model_is_refused_across_processes(secateur, broken, held):
    truncate(broken)
    secateur("eval", broken, "--eval", held).refused("broken", "corrupt or cut short", "again")


TEXTS = {
    "empty.txt": (b"", ["empty"]),
    "white.txt": (b" \n\t\n" * 100, ["empty"]),
    "short.txt": (b"the old wood", ["too short", "32", "tokens"]),
    "latin.txt": ("größer".encode("latin-1") * 500, ["UTF-8"]),
    "binary.txt": (b"\x00\xff" * 5000, ["UTF-8"]),
    "broken.jsonl": (b'{"text": "a"}\n{"text": ', ["line 2", "not JSON"]),
    "nofield.jsonl": (b'{"text": "a"}\n{"content": "b"}', ["line 2", '"text"']),
    "number.jsonl": (b'{"text": 3}', ["line 1", '"text"']),
    "list.jsonl": (b'["text"]', ["line 1", '"text"']),
    "void.jsonl": (b"", ["empty"]),
    "folder": (None, ["holds no"]),
    "missing.txt": (None, ["no such file"]),
}


@pytest.mark.parametrize("role", ["--calibration", "--eval"])
@pytest.mark.parametrize("name", TEXTS)
def test_an_unusable_text_is_refused(compress, tmp_path, room, name, role):
    content, words = TEXTS[name]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    elif name == "folder":
        path.mkdir()
    wanted = words if "too short" in words else [name, *words]
    compress(role, path).refused(*wanted)
    assert list(room.iterdir()) == []


FLAGS = [
    (("--method", "modegtp"), ["modegtp", "did you mean 'modegpt'"]),
    (("--method=svd",), ["svd", "modegpt"]),
    (("-m", "nothing-like-it"), ["nothing-like-it", "modegpt"]),
    (("-mmodegtp",), ["modegtp", "modegpt"]),
    (("--keep", "0"), ["keep"]),
    (("--keep", "1.5"), ["keep", "1.5"]),
    (("--keep", "-1"), ["keep", "-1"]),
    (("--keep", "abc"), ["--keep", "abc"]),
    (("--keep", "nan"), ["keep", "nan"]),
    (("--keep", "inf"), ["keep", "inf"]),
    (("--method=modegpt", "--keep", "0.001"), ["keep", "out of reach", "Ask for"]),
    (("--allocator=influence", "--keep", "0.001"), ["keep", "out of reach", "Ask for"]),
    (("--allocator=uniform", "--keep", "0.001"), ["keep", "out of reach", "Ask for"]),
    (("--target=cache", "--keep", "0.001"), ["keep", "out of reach", "Ask for", "cache"]),
    (("--tier=plain", "--keep", "0.001"), ["keep", "out of reach", "Ask for"]),
    (("--samples", "0"), ["--samples", "0"]),
    (("--samples", "many"), ["--samples", "many"]),
    (("--length", "1"), ["--length"]),
    (("--length", "129"), ["--length", "129", "128"]),
    (("--multiple-of", "0"), ["--multiple-of"]),
    (("--method=modegpt", "--temperature", "0"), ["influence", "temperature", "0"]),
    (("--allocator=influence", "--temperature", "nan"), ["influence", "temperature", "nan"]),
    (("--method=modegpt", "--max-sparsity", "2"), ["influence", "max_sparsity", "2"]),
    (("--method=modegpt", "--leverage-ridge", "-1"), ["modegpt", "leverage_ridge", "-1"]),
    (("--ridge", "-1"), ["auto", "ridge", "-1"]),
    (("--ridge", "nan"), ["auto", "ridge", "nan"]),
    (("--iterations", "-1"), ["auto", "iterations", "-1"]),
    (("--iterations", "1.5"), ["--iterations", "1.5"]),
    (("--cells", "99"), ["knapsack", "cells", "99", "100"]),
    (("--temperature", "1"), ["--temperature"]),
    (("--method=modegpt", "--cells", "200"), ["--cells"]),
    (("--allocator=uniform", "--cells", "200"), ["--cells"]),
    (("--latency-batch", "0"), ["--latency-batch"]),
    (("--latency-length", "0"), ["--latency-length"]),
    (("--device", "nonsense"), ["--device", "nonsense", "cpu"]),
    (("--device", "meta"), ["--device", "meta"]),
    (("--device", ""), ["--device"]),
    (("--dtype", "int8"), ["--dtype", "int8", "float32"]),
    (("--dtype", "nonsense"), ["--dtype", "nonsense", "float32"]),
    (("--dtype", "float8_e4m3fn"), ["--dtype", "float8_e4m3fn", "float32"]),
    (("--eval-windows", "0"), ["--eval-windows"]),
    (("--new-tokens", "0"), ["--new-tokens"]),
    (("--prompt", ""), ["prompt"]),
    (("--kep", "0.8"), ["--kep", "--keep"]),
    (("one", "more"), ["argument"]),
]


@pytest.mark.parametrize(("flags", "words"), FLAGS, ids=lambda v: " ".join(v))
def test_a_wrong_value_is_refused(compress, room, flags, words):
    compress(*flags).refused(*words)
    assert list(room.iterdir()) == []


@pytest.mark.skipif("__import__('torch').cuda.is_available()")
def test_an_absent_device_is_refused(compress, room):
    compress("--device", "cuda").refused("--device", "cuda", "cpu")
    assert list(room.iterdir()) == []


def test_an_unknown_command_is_refused(run):
    run("compres").refused("compres")


def test_arguments_are_required(run):
    run("compress").refused("MODEL")
    run("compress", "somewhere").refused("OUT")


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory, tokenizer):
    """A family whose positions are a table, so that none exist beyond its end."""
    from conftest import save_checkpoint
    from transformers import GPT2Config

    config = GPT2Config(
        vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2
    )
    return save_checkpoint(tmp_path_factory.mktemp("models") / "gpt2", config, tokenizer)


@pytest.mark.parametrize("flags", [("--length", 65), ("--eval-length", 65)], ids=str)
def test_more_tokens_than_positions_are_refused(compress, gpt2, room, flags):
    compress(*flags, source=gpt2).refused(flags[0], "65", "64")
    assert list(room.iterdir()) == []


def test_plan_refuses_more_tokens_than_positions(run, gpt2, text, room):
    given = ["--calibration", text, "--samples", 4, "--length", 65]
    run("plan", gpt2, *given, "-o", room / "p.json").refused("65", "64")
    assert list(room.iterdir()) == []


def test_eval_of_a_model_with_few_positions(run, gpt2, held, near):
    """Its default window must be one that the model can read."""
    run("eval", gpt2, "--eval", held, "--no-speed").succeeded()


def test_a_continuation_beyond_the_last_position_is_refused(run, gpt2, held, near):
    given = ["--eval", held, "--eval-length", 32, "--no-speed", "--new-tokens", 60]
    run("eval", gpt2, *given).refused("--new-tokens", "64")


def test_speed_near_the_last_position(run, gpt2, held, near):
    """Timing writes behind a whole window; the model must have positions for that."""
    given = ["--eval", held, "--eval-length", 64, "--new-tokens", 4]
    run("eval", gpt2, *given).succeeded()


@pytest.mark.parametrize("command", ["compress", "plan"])
def test_keep_nothing_is_refused_alike(run, model, text, room, near, command):
    out = [room / "out"] if command == "compress" else ["-o", room / "p.json"]
    given = ["--calibration", text, "--samples", 4, "--length", 32, "--keep", 0]
    run(command, model, *out, *given).refused("keep", "0")
    assert list(room.iterdir()) == []


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
    from secateur import checkpoint

    monkeypatch.setattr(checkpoint, "save_file", full)
    compress().refused("No space left")
    assert list(room.iterdir()) == []


def test_a_full_disk_while_the_plan_is_written(compress, room, monkeypatch):
    write = Path.write_text
    monkeypatch.setattr(
        Path,
        "write_text",
        lambda self, *a, **k: full() if self.name == "plan.json" else write(self, *a, **k),
    )
    compress().refused("No space left")
    assert list(room.iterdir()) == []


@pytest.mark.parametrize("old", [None, "old"])
def test_a_plan_that_does_not_fit_leaves_what_was_there(run, model, text, room, monkeypatch, old):
    path = room / "plan.json"
    if old is not None:
        path.write_text(old)
    write = Path.write_text

    def half(self, content, *args, **options):
        write(self, content[: len(content) // 2], *args, **options)
        full()

    given = ["--calibration", text, "--samples", 4, "--length", 32, "--overwrite"]
    run("plan", model, *given, "--dry-run").succeeded()  # then the plan is all there is to write
    monkeypatch.setattr(Path, "write_text", half)
    run("plan", model, *given, "-o", path).refused("No space left")
    assert {p.name: p.read_text() for p in room.iterdir()} == ({"plan.json": old} if old else {})


def test_a_plan_file_that_cannot_be_written_is_refused_first(run, model, text, room, monkeypatch):
    from secateur import prepare

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
    compress(out=small_disk / "out").refused("space")
    assert list(small_disk.iterdir()) == []


def test_a_wrong_reload_is_no_result(compress, room, monkeypatch):
    from safetensors.torch import load_file, save_file

    from secateur import pipeline

    judge = pipeline.judge_apart

    def corrupted(source, questions, settings, progress, memory=None, ids=None):
        if memory is not None:
            tensors = load_file(Path(source) / WEIGHTS)
            tensors["model.layers.1.mlp.down_proj.weight"][0] += 1
            save_file(tensors, Path(source) / WEIGHTS, metadata={"format": "pt"})
        return judge(source, questions, settings, progress, memory, ids)

    monkeypatch.setattr(pipeline, "judge_apart", corrupted)
    found = compress()
    assert found.code not in (0, 2)
    assert "is not the model that was compressed" in found.err
    assert "Traceback" not in found.err
    assert list(room.iterdir()) == []


def test_a_crashed_measuring_process_is_reported(compress, room, monkeypatch, near):
    from types import SimpleNamespace

    from secateur.evaluate import judge

    killed = SimpleNamespace(DEVNULL=None, run=lambda *_, **__: SimpleNamespace(returncode=-9))
    monkeypatch.setattr(judge, "subprocess", killed)
    found = compress()
    assert found.code not in (0, 2)
    assert "killed" in found.err
    assert "Traceback" not in found.err
    assert list(room.iterdir()) == []


def test_small_settings_are_refused_before_the_model_is_measured(compress, near, tmp_path):
    compress("--calibration", tmp_path / "nowhere.txt").refused("nowhere.txt")
    compress("--eval", tmp_path / "nowhere.txt").refused("nowhere.txt")
    assert near == []


def test_the_defaults_of_the_small_runs_are_valid(compress):
    assert "--samples" in SMALL
    compress().succeeded()


@pytest.mark.parametrize(
    "flags",
    [("--method", "modegpt"), ("--allocator", "uniform"), ("--tier", "plain")],
    ids=" ".join,
)
def test_a_budget_out_of_reach_is_refused_before_the_model_is_measured(compress, near, room, flags):
    compress("--keep", 0.01, *flags).refused("out of reach", "ask for between")
    assert near == []
    assert list(room.iterdir()) == []


def test_a_quantised_model_is_refused(compress, model, room, tmp_path):
    folder = tmp_path / "quantised"
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    compress(source=folder).refused("quantised", "unquantised")
    assert list(room.iterdir()) == []


def test_an_output_that_appears_meanwhile_is_not_replaced(compress, room, monkeypatch):
    from secateur import pipeline

    write = pipeline.write

    def late(*args, **kwargs):
        (room / "out").mkdir()
        (room / "out" / "config.json").write_text("theirs")
        return write(*args, **kwargs)

    monkeypatch.setattr(pipeline, "write", late)
    compress().refused("appeared")
    assert (room / "out" / "config.json").read_text() == "theirs"


def test_calibration_text_under_another_spelling_is_judged_on_its_rest(compress, text, room):
    spelled = text.parent / ".." / text.parent.name / text.name
    compress("--eval", spelled).succeeded()
    report = json.loads((room / "out/secateur/report.json").read_text())
    assert f"rest of {text.name}" in report["dense"]["perplexity"]


def test_a_home_folder_of_nobody_is_no_traceback(compress, run):
    compress(source="~nobody-here/model").refused("~nobody-here/model")
    run("inspect", "~nobody-here/model").refused("~nobody-here/model")
