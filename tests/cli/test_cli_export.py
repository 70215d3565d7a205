"""`secateur export --to plain` and `--to onnx` at the command line."""

import json

import pytest
from transformers import AutoModelForCausalLM


def config(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.fixture
def written(run, model, held, room, near, plan, tmp_path):
    """A function that compresses by a plan edited by hand, and gives the folder."""

    def make(**sizes):
        content = plan("--method", "modegpt", "--keep", "0.7")
        for row in content["units"]:
            own = sizes.get(row["unit"].replace(".", "_"), sizes.get(row["kind"]))
            row["after"] = own or row["before"]
        (tmp_path / "plan.json").write_text(json.dumps(content))
        judge = ["--eval", held, "--no-speed", "--eval-windows", 2, "--new-tokens", 4]
        made = run("compress", model, room / "out", "--plan", tmp_path / "plan.json", *judge)
        made.succeeded()
        return room / "out"

    return make


def test_values_of_one_width_become_a_stock_class(run, written, room):
    out = written(value_output=6, mlp=40)
    assert config(out)["model_type"] == "secateur_llama"
    shown = run("export", out, room / "plain", "--to", "plain").succeeded()
    assert "mimo_v2_flash" in shown.out
    assert config(room / "plain")["v_head_dim"] == 6
    assert not list((room / "plain").glob("*.py"))
    made = AutoModelForCausalLM.from_pretrained(room / "plain")
    assert type(made).__name__ == "MiMoV2FlashForCausalLM"
    again = run("export", out, room / "again", "--to", "plain", "--json").succeeded()
    assert json.loads(again.out)["model_type"] == "mimo_v2_flash"
    run("eval", room / "plain", "--no-speed", "--eval-windows", 2, "--new-tokens", 4).succeeded()


def test_units_in_the_way_are_named(run, written, room):
    out = written(layers_1_mlp=40)
    refused = run("export", out, room / "plain", "--to", "plain")
    refused.refused("layers.0.mlp 64", "layers.1.mlp 40", "--tier plain", "--to gguf")
    assert [p.name for p in room.iterdir()] == ["out"]


def test_what_is_asked_for_wrongly(run, model, room):
    run("export", model, room / "d", "--to", "plian").refused("plain", "onnx", "gguf")
    run("export", model, room / "d", "--to", "plain").refused("as it is")
    run("export", model, room / "d", "--to", "plain", "--dense").refused("give one of: --dense")
    run("export", model, room / "d", "--to", "plain", "--type", "f16").refused("--to gguf")
    run("export", model, room / "d", "--to", "onnx").refused("model.onnx")
    run("export", model, model / "m.onnx", "--to", "onnx", "--unchecked").refused("--to gguf")
    assert list(room.iterdir()) == []


def test_a_missing_extra_is_named(run, model, room, monkeypatch):
    monkeypatch.setattr("secateur.export.onnx.find_spec", lambda name: None)
    run("export", model, room / "m.onnx", "--to", "onnx").refused("pip install", "secateur[onnx]")
