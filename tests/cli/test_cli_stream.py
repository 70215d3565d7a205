"""Models that stay on disk, from the command line."""

import json

import pytest

WEIGHTS = "model.safetensors"


def test_a_streamed_run_has_the_same_bytes(compress, room):
    """And its report says what was not measured."""
    compress("--keep", 0.8, "--stream", "off", out=room / "whole").succeeded()
    found = compress("--keep", 0.8, "--stream", "on", out=room / "streamed").succeeded()
    assert "block by block" in found.err
    for name in (WEIGHTS, "config.json", "secateur/plan.json"):
        assert (room / "streamed" / name).read_bytes() == (room / "whole" / name).read_bytes()
    whole, streamed = (
        json.loads((room / name / "secateur" / "report.json").read_text())
        for name in ("whole", "streamed")
    )
    for side in ("dense", "compressed"):
        assert streamed[side]["perplexity"] == whole[side]["perplexity"]
        assert streamed[side]["speed"] == {}
    assert streamed["compressed"]["agreement"] == whole["compressed"]["agreement"]
    assert streamed["observed"] == whole["observed"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--method", "slicegpt"), ("slicegpt", "--stream off")),
        (("--method", "llm-pruner"), ("gradients", "--stream off")),
        (("--allocator", "spdy"), ("spdy", "--stream off")),
        (("--target", "latency", "--latency-length", 32), ("latency", "--stream off")),
        (("--method", "rtn", "--group", 0), ("rtn packs integers", "--stream off")),
        (("--stream", "sometimes"), ("auto", "on", "off")),
    ],
)
def test_what_needs_the_whole_model_is_refused(compress, room, given, words):
    stream = () if "--stream" in given else ("--stream", "on")
    compress("--keep", 0.8, *given, *stream).refused(*words)
    assert list(room.iterdir()) == []
