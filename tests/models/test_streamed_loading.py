"""A model that stays on disk gives what it gives when it is whole in memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from secateur import Settings, Store, calibrate, open_model
from secateur.calibration import forward_batches as batching
from secateur.calibration.forward_batches import batches
from secateur.calibration.layer_stream import Stream
from secateur.data.bundled import model_path
from secateur.evaluate.damage.recall import recall
from secateur.evaluate.likelihood import Pair, likelihoods
from secateur.evaluate.perplexity import answered
from secateur.methods.auto import Auto
from secateur.models.loading import skeleton
from secateur.models.model import fingerprint
from secateur.models.offload import Offload, own_head
from secateur.models.streamed_loading import obstacle, open_streamed
from secateur.scoring import calibration_selection as selecting
from secateur.scoring.calibration_selection import MiddleStates, leverage, means
from secateur.scoring.evidence import score
from secateur.utils.errors import HaltedError
from tests.support import families
from tests.support.families import FAMILIES, HIDDEN

CPU = Settings(device="cpu", dtype="float32")
ROOT = Path(__file__).parents[2]
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
    read, own = [], Offload._fetch
    monkeypatch.setattr(
        Offload, "_fetch", lambda home, block: (read.append(block.index), own(home, block))
    )
    return read


def test_answers_to_tasks_are_the_same_and_read_the_model_once(dense, fetched, monkeypatch):
    """Once for inputs of like length. The mistake: once for every batch of them."""
    whole, model = open_model(dense("llama"), CPU), streamed(dense("llama"))
    monkeypatch.setattr(batching, "TOKENS_PER_BATCH", 24)
    ids = families.read("llama", 12, 16).ids.tolist()
    pairs = [Pair(tuple(row[: 9 + i % 3]), tuple(row[12:])) for i, row in enumerate(ids)]
    found, expected = likelihoods(model, pairs), likelihoods(whole, pairs)
    assert [one.greedy for one in found] == [one.greedy for one in expected]
    assert [x.total for x in found] == pytest.approx([x.total for x in expected], rel=1e-6)
    assert fetched == [block.index for block in model.blocks]


def test_a_head_that_could_not_be_read_is_read_again(tmp_path):
    """The mistake: to take it for one that is there. Its logits are then anything."""
    folder = families.save(families.random_model("llama"), tmp_path / "model")
    model, tokens = open_streamed(str(folder), CPU), families.read("llama", 2, 16)
    assert own_head(model.module) is not None
    given = model.use.inputs(tokens)
    with torch.no_grad():
        expected = model.module(**given).logits
        (file,) = folder.glob("*.safetensors")
        file.rename(tmp_path / "away")
        with pytest.raises(HaltedError):
            model.module.lm_head(torch.zeros(1, HIDDEN))
        (tmp_path / "away").rename(file)
        assert torch.equal(model.module(**given).logits, expected)


@pytest.mark.parametrize("streams", [False, True])
def test_logits_of_a_few_windows_at_a_time_measure_the_same(dense, monkeypatch, streams):
    """The mistake: those of a whole batch, which are gigabytes with a large vocabulary."""
    folder, tokens, method = dense("llama"), families.read("llama", 5, 16), Auto()
    model = streamed(folder) if streams else open_model(folder, CPU)
    store, seen, own = Store(), [], Stream.logits
    calibrate(model, tokens, method.needs | method.allocator.needs, store)
    expected = score(model, method, store, tokens).losses
    vocabulary = model.module.get_input_embeddings().weight.shape[0]
    monkeypatch.setattr(batching, "LOGITS_PER_BATCH", 2 * 16 * vocabulary)
    monkeypatch.setattr(Stream, "logits", lambda s, b, x: (seen.append(len(x)), own(s, b, x))[1])
    found = score(model, method, store, tokens).losses
    assert max(seen) == 2
    for name, curve in expected.items():
        assert found[name].errors == pytest.approx(curve.errors, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("select", ["leverage", "dpp"])
def test_a_choice_of_windows_reads_the_model_once_a_look(dense, fetched, select, monkeypatch):
    """The mistake: once for every batch of windows."""
    whole, model = open_model(dense("llama"), CPU), streamed(dense("llama"))
    monkeypatch.setattr(selecting, "TOKENS_PER_BATCH", 32)
    tokens = families.read("llama", 9, 16)
    looks = []
    for given in (whole, model):
        states = MiddleStates(given, tokens)
        look = leverage if select == "leverage" else means
        looks.append(look(states, tokens.mask))
    torch.testing.assert_close(looks[1], looks[0], rtol=1e-5, atol=1e-7)
    assert len(fetched) == len(model.blocks) // 2 * (2 if select == "leverage" else 1)


ALLOCATES = """
import sys, torch
from secateur.evaluate.memory import peak_bytes
from secateur.utils.memory import give_back
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
if sys.argv[1] == "give back":
    give_back()
before, kept = resident(), []
for _ in range(24):
    many = [torch.ones(2**21) for _ in range(8)]  # 8 MB each
    kept.append(torch.ones(2**15))
    many.clear()
    kept.append(torch.ones(2**17))
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc's allocator")
def test_what_goes_gives_its_memory_back():
    """Between blocks that come and go something always stays."""
    left = [
        int(subprocess.check_output([sys.executable, "-c", ALLOCATES, what], cwd=ROOT))
        for what in ("give back", "keep")
    ]
    assert left[0] < 24 * 2**20
    assert left[0] < left[1] - 2**24


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
