"""A model that stays on disk gives what it gives when it is whole in memory."""

import pytest
import torch

from secateur import Settings, Store, calibrate, open_model
from secateur.bundled import model_path
from secateur.evaluate import passes
from secateur.evaluate.likelihood import Pair, likelihoods
from secateur.evaluate.passes import batches
from secateur.evaluate.perplexity import answered
from secateur.evaluate.recall import recall
from secateur.methods.auto import Auto
from secateur.model import fingerprint
from secateur.opening import skeleton
from secateur.residence import Residence
from secateur.scores import score
from secateur.stream import Stream
from secateur.streaming import obstacle, open_streamed
from tests import families
from tests.families import FAMILIES

CPU = Settings(device="cpu", dtype="float32")
every_family = pytest.mark.parametrize("name", FAMILIES)


def streamed(folder):
    reason = obstacle(skeleton(str(folder), CPU))
    if reason is not None:
        pytest.skip(reason)
    return open_streamed(str(folder), CPU)


def on_disk(model):
    inside = f"{model.prefix}{model.anatomy.blocks}."
    return [p.device.type for n, p in model.module.named_parameters() if n.startswith(inside)]


@every_family
def test_it_says_what_the_whole_model_says(dense, name):
    whole, model = open_model(dense(name), CPU), streamed(dense(name))
    assert set(on_disk(model)) == {"meta"}
    assert whole.blocks  # seen as blocks, both compute alike
    tokens = families.read(name, 5, 16)
    with torch.no_grad():
        given = model.use.inputs(tokens)
        assert torch.equal(model.module(**given).logits, whole.module(**given).logits)
    assert set(on_disk(model)) == {"meta"}
    for (_, found), (_, expected) in zip(
        batches(model, tokens), batches(whole, tokens), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert answered(model, tokens) == answered(whole, tokens)
    assert fingerprint(model) == fingerprint(whole)
    buffers = dict(whole.module.named_buffers())
    for key, buffer in model.module.named_buffers():
        if buffer.device.type != "meta":
            assert torch.equal(buffer, buffers[key]), key


@every_family
def test_statistics_and_scores_are_the_same(dense, name):
    whole, model = open_model(dense(name), CPU), streamed(dense(name))
    tokens, method = families.read(name, 5, 16), Auto()
    found = []
    for given in (whole, model):
        store = Store()
        calibrate(given, tokens, method.needs | method.allocator.needs, store)
        found.append((store, score(given, method, store, tokens)))
    (expected, plainly), (here, streaming) = found
    for block in whole.blocks:
        for need, statistic in expected.get(block.index, method.needs).items():
            assert torch.equal(statistic.total, here.get(block.index, [need])[need].total), need
    assert streaming.curves == plainly.curves
    assert streaming.readings == plainly.readings
    for key, curve in plainly.losses.items():
        assert streaming.losses[key].errors == pytest.approx(curve.errors, rel=1e-9), key
    assert set(on_disk(model)) == {"meta"}


@pytest.fixture
def fetched(monkeypatch):
    """Blocks in the order in which they are read."""
    read, own = [], Residence._fetch
    monkeypatch.setattr(
        Residence, "_fetch", lambda home, block: (read.append(block.index), own(home, block))
    )
    return read


def test_answers_to_tasks_are_the_same_and_read_the_model_once(dense, fetched, monkeypatch):
    """Once for inputs of like length. The mistake: once for every batch of them."""
    whole, model = open_model(dense("llama"), CPU), streamed(dense("llama"))
    monkeypatch.setattr(passes, "TOKENS_PER_BATCH", 24)
    ids = families.read("llama", 12, 16).ids.tolist()
    pairs = [Pair(tuple(row[: 9 + i % 3]), tuple(row[12:])) for i, row in enumerate(ids)]
    found, expected = likelihoods(model, pairs), likelihoods(whole, pairs)
    assert [one.greedy for one in found] == [one.greedy for one in expected]
    assert [x.total for x in found] == pytest.approx([x.total for x in expected], rel=1e-6)
    assert fetched == [block.index for block in model.blocks]


def test_planted_keys_are_found_the_same(fetched):
    folder = model_path()
    whole, model = open_model(folder, CPU), open_streamed(str(folder), CPU)
    filler = torch.arange(3, 3 + 128)
    said = []
    found, expected = recall(model, filler, said.append), recall(whole, filler)
    assert found["nats"] == pytest.approx(expected["nats"], abs=1e-6)
    assert found["found"] == expected["found"]
    texts = len(expected["by_length"]) * len(expected["by_depth"])
    assert sum(said) == texts * expected["keys"]
    assert len(fetched) == texts * len(model.blocks)


def test_only_what_is_needed_is_read(dense, fetched):
    """The mistake: a block read again for every batch of a pass."""
    model = streamed(dense("llama"))
    with torch.no_grad():
        stream = Stream(model, families.read("llama", 6, 16), rows=1)
        for block in model.in_turn():
            stream.advance(block)
    assert fetched == [block.index for block in model.blocks]
