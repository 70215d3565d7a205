"""ONNX graphs: what onnxruntime says of them, and what is refused."""

import importlib.util

import pytest
import torch

from secateur import InputError, Settings
from secateur.export.onnx import ASKED, LIBRARIES, check_request, export_onnx
from secateur.utils.errors import RunError
from tests.contract.conftest import logits, spread
from tests.support.families import FAMILIES, read
from tests.support.shaped import shaped

CPU = Settings(device="cpu")
SIZES = {
    "layers.0.mlp": 40,
    "layers.1.query_key": 4,
    "layers.1.value_output": 3,
    "layers.2.value_output": 5,
}
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in LIBRARIES),
    reason="needs onnx, onnxruntime and onnxscript",
)


@pytest.fixture
def source(opened, tmp_path):
    """Variant name to a checkpoint of layers of different shapes."""
    return lambda name: shaped(opened(name), tmp_path / "source", SIZES)


@needs_onnx
@pytest.mark.parametrize(
    "name",
    [
        "llama",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("gpt2", "gemma2", "bert", "vit")),
    ],
)
def test_the_graph_is_the_model_at_any_length(source, tmp_path, name):
    import onnxruntime

    folder = source(name)
    made = export_onnx(folder, tmp_path / "model.onnx", CPU)
    assert made.difference < 1e-4
    assert made.bytes == (tmp_path / "model.onnx").stat().st_size
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    model = FAMILIES[name].auto.from_pretrained(folder).eval()
    for rows, length in ((1, 33), (4, 5)):
        tokens = read(name, rows, length, seed=9)
        given = {"pixel_values": tokens.ids}
        if FAMILIES[name].use != "images":
            given = {"input_ids": tokens.ids, "attention_mask": torch.ones_like(tokens.ids)}
        (found,) = session.run(["logits"], {k: v.numpy() for k, v in given.items()})
        assert spread(torch.from_numpy(found), logits(model, tokens)) < 1e-3


@pytest.fixture
def traced(monkeypatch):
    """Graphs whose answers a test makes up, as tracing takes long."""
    said = {}

    class Session:
        def __init__(self, *_, **__):
            pass

        def run(self, _, given):
            return [said["of"](given).numpy()]

    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(
        "secateur.export.onnx._trace", lambda model, path: path.write_bytes(b"graph")
    )
    monkeypatch.setattr("onnxruntime.InferenceSession", Session)
    return said


def answers(folder):
    """What a graph of a Llama should say."""
    model = FAMILIES["llama"].auto.from_pretrained(folder).eval()

    def right(given):
        with torch.inference_mode():
            return model(**{k: torch.from_numpy(v) for k, v in given.items()}).logits

    return right


@needs_onnx
def test_a_graph_that_says_something_else_never_appears(source, traced, tmp_path):
    folder = source("llama")
    right = answers(folder)
    traced["of"] = right
    export_onnx(folder, tmp_path / "right.onnx", CPU)
    traced["of"] = lambda given: (
        right(given).roll(1, 1) if given["input_ids"].shape[1] > 12 else right(given)
    )
    with pytest.raises(RunError, match="not the model"):
        export_onnx(folder, tmp_path / "wrong.onnx", CPU)
    traced["of"] = lambda given: right(given)[:, -1:]
    with pytest.raises(RunError, match="shape"):
        export_onnx(folder, tmp_path / "wrong.onnx", CPU)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["right.onnx", "source"]


@needs_onnx
@pytest.mark.parametrize("wrong", [0, 1])
def test_a_graph_that_says_no_number_never_appears(source, traced, tmp_path, wrong):
    folder = source("llama")
    model = FAMILIES["llama"].auto.from_pretrained(folder).eval()

    def nan(given):
        with torch.inference_mode():
            right = model(**{k: torch.from_numpy(v) for k, v in given.items()}).logits
        return right * float("nan") if len(given["input_ids"]) == ASKED[wrong][0] else right

    traced["of"] = nan
    with pytest.raises(RunError, match=r"not the model.*nan"):
        export_onnx(folder, tmp_path / "wrong.onnx", CPU)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@needs_onnx
@pytest.mark.parametrize("name", ["Fail", "InvalidArgument", "RuntimeException", "NotImplemented"])
def test_what_onnxruntime_raises_is_said(source, traced, tmp_path, name):
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    def fails(given):
        raise getattr(state, name)("no such thing")

    traced["of"] = fails
    with pytest.raises(RunError, match=r"does not run.*no such thing"):
        export_onnx(source("llama"), tmp_path / "wrong.onnx", CPU)


@needs_onnx
def test_a_graph_that_does_not_open_is_said(source, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "secateur.export.onnx._trace", lambda model, path: path.write_bytes(b"graph")
    )
    with pytest.raises(RunError, match="does not open"):
        export_onnx(source("llama"), tmp_path / "wrong.onnx", CPU)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@needs_onnx
def test_overwriting_leaves_no_weights_of_the_graph_before(source, traced, tmp_path):
    folder = source("llama")
    right = answers(folder)
    traced["of"] = right
    for name in ("model.onnx", "model.onnx.data"):
        (tmp_path / name).write_text("stale")
    made = export_onnx(folder, tmp_path / "model.onnx", CPU, overwrite=True)
    assert made.files == ("model.onnx",)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "source"]


def test_requests_are_refused_early(dense, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"model\.onnx"):
        check_request(tmp_path / "folder", False)
    with pytest.raises(InputError, match="no folder"):
        check_request(tmp_path / "missing" / "m.onnx", False)
    (tmp_path / "m.onnx").write_text("")
    with pytest.raises(InputError, match="--overwrite"):
        check_request(tmp_path / "m.onnx", False)
    with monkeypatch.context() as patched:
        patched.setattr("secateur.export.onnx.find_spec", lambda name: None)
        with pytest.raises(InputError, match=r"secateur\[onnx\]"):
            check_request(tmp_path / "n.onnx", False)


@needs_onnx
def test_models_of_two_parts_are_refused(dense, tmp_path):
    with pytest.raises(InputError, match="two graphs"):
        export_onnx(dense("t5"), tmp_path / "m.onnx", CPU)
