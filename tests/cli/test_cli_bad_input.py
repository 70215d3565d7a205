"""Whatever is wrong with the input: one message, exit code 2, and nothing left behind."""

import json
import os
import shutil

import pytest
from conftest import SMALL, WEIGHTS


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
    "no language model": (config_changed(model_type="siglip_vision_model"), ["siglip"]),
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
    (("--method=svdd",), ["svdd", "svd"]),
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


def test_calibration_text_under_another_spelling_is_judged_on_its_rest(compress, text, room):
    spelled = text.parent / ".." / text.parent.name / text.name
    compress("--eval", spelled).succeeded()
    report = json.loads((room / "out/secateur/report.json").read_text())
    assert f"rest of {text.name}" in report["dense"]["perplexity"]


def test_a_home_folder_of_nobody_is_no_traceback(compress, run):
    compress(source="~nobody-here/model").refused("~nobody-here/model")
    run("inspect", "~nobody-here/model").refused("~nobody-here/model")
