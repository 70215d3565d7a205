"""Blocks narrowed one after the other: streams, targets and fits, against the dense model."""

import pytest
import torch

from secateur import Store, calibrate
from secateur.apply.sequential import Propagation, _adds_up
from secateur.apply.surgery import narrow_block
from secateur.calibration.layer_stream import Stream
from secateur.calibration.statistics import wide
from secateur.data.tokens import Tokens
from secateur.methods.auto import Auto
from tests.support.streams import look, windows


@pytest.fixture(autouse=True)
def one_batch(monkeypatch):
    """Where a test doesn't say otherwise, so that numbers are rounded as in a plain pass."""
    monkeypatch.setattr("secateur.calibration.layer_stream.BATCHES", 1)


class Run:
    """A model, its statistics, and the two streams before its first block."""

    def __init__(self, model, tokens=None, **options):
        self.model, self.tokens, self.store = model, tokens or windows(), Store()
        self.method = Auto(**({"iterations": 0, "ridge": 1e-9} | options))
        calibrate(model, self.tokens, self.method.needs, self.store)
        self.line = Propagation(model, self.tokens, self.method)
        self.units = model.units(8)

    def sizes(self, **narrow):
        """Today's sizes but for ``kind_block=size``."""
        found = {unit.name: unit.size for unit in self.units}
        for where, size in narrow.items():
            kind, _, block = where.rpartition("_")
            found[f"layers.{block}.{kind}"] = size
        return found

    def go(self, block, **narrow):
        """Narrow one block."""
        own = [unit for unit in self.units if unit.block == block.index]
        statistics = self.store.get(block.index, self.method.needs)
        self.line.narrow_block(block, own, self.sizes(**narrow), statistics)
        return self

    def all(self, **narrow):
        for block in self.model.blocks:
            self.go(block, **narrow)
        return self


def states(model, tokens, blocks):
    """Hidden states behind so many blocks."""
    walking = Stream(model, tokens)
    with torch.no_grad():
        for block in model.blocks[:blocks]:
            for batch in walking.batches:
                walking.put(batch, walking.through(block, walking.at(batch)))
    return walking.states


def rows(values):
    return values.flatten(0, 1)


def fitted(features, target):
    return torch.linalg.lstsq(rows(features), rows(target), driver="gelsd").solution


def distance(a, b):
    return float((a - b).square().sum())


@pytest.mark.parametrize(
    "name", ["llama", "qwen3", "opt", "gpt2", "gpt_neox", "opt_norm_after", "gemma2", "falcon"]
)
def test_at_full_sizes_nothing_changes(opened, name):
    """Bit by bit, although every consumer could be fitted again."""
    model = opened(name, "float64")
    run = Run(model, iterations=4)
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    run.all()
    after = model.module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(run.line.narrow.states, run.line.dense.states)
    assert torch.equal(run.line.dense.states, states(model, run.tokens, 3))
    assert not run.line.moved


def test_blocks_before_the_first_narrow_one_stay_and_those_behind_do_not(opened):
    model = opened("llama", "float64")
    run = Run(model)
    consumers = [block.mlp.consumer_weight.clone() for block in model.blocks]
    outputs = [block.attention.output_rows.clone() for block in model.blocks]
    run.all(mlp_1=24)
    assert torch.equal(model.blocks[0].mlp.consumer_weight, consumers[0])
    assert torch.equal(model.blocks[0].attention.output_rows, outputs[0])
    assert [block.mlp.consumer_weight.shape[0] for block in model.blocks] == [56, 24, 56]
    assert not torch.allclose(model.blocks[2].mlp.consumer_weight, consumers[2], atol=1e-3)
    assert not torch.allclose(model.blocks[2].attention.output_rows, outputs[2], atol=1e-3)


@pytest.mark.parametrize(
    "name",
    [
        *("llama", "phi3", "mistral", "opt", "gpt2", "gpt_neox", "gpt_neox_sequential"),
        *("falcon", "cohere"),
    ],
)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_a_plain_sum_is_known_as_one(opened, name, dtype):
    """Whether or not the MLP reads the attention's output, and though bfloat16 rounds the sums."""
    model, tokens = opened(name, dtype), windows(4)
    line = Propagation(model, tokens, Auto())
    for block in model.blocks:
        before = line.dense.states.clone()
        with torch.no_grad():
            assert line._run_dense(block)
        seen, after = look(model, tokens, block, before)
        assert torch.equal(line.targets[:], wide(before) + wide(seen.attention))
        assert torch.equal(line.dense.states, after)


@pytest.mark.parametrize("name", ["opt_norm_after", "gemma2", "olmo2"])
@pytest.mark.parametrize("loud", [1.0, 1e4])
def test_a_norm_behind_is_known_as_no_plain_sum(opened, name, loud):
    """The targets are then the dense outputs themselves, behind the sum or before it.

    The mistake: what a block adds to a loud stream is too small to see that it was normalised.
    """
    model, tokens = opened(name, "float64"), windows(4)
    model.module.get_input_embeddings().weight.data *= loud
    line = Propagation(model, tokens, Auto())
    for block in model.blocks:
        before = line.dense.states.clone()
        with torch.no_grad():
            assert not line._run_dense(block)
        seen, _ = look(model, tokens, block, before)
        assert torch.equal(line.targets[:], seen.attention)
        assert torch.equal(line.inputs[:], seen.mlp)


def test_behind_norms_dense_outputs_are_better_targets(monkeypatch, opened):
    """The mistake: a consumer asked to bring the stream back, and then normalised."""
    found = []
    for taken_for_a_sum in (False, True):
        if taken_for_a_sum:
            monkeypatch.setattr("secateur.models.block.Block.sums", True)
            monkeypatch.setattr("secateur.apply.sequential._adds_up", lambda *_: True)
        run = Run(opened("gemma2", "float64"), windows(48), ridge=1e-4)
        run.all(**{f"mlp_{i}": 32 for i in range(3)})
        found.append(distance(run.line.narrow.states, run.line.dense.states))
    assert found[0] < 0.9 * found[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_multiplier_of_what_is_added_is_no_plain_sum(dtype):
    """However loud the stream is, as far as its format can tell."""
    generator = torch.Generator().manual_seed(0)
    stream, added = (torch.randn(2, 50, 8, generator=generator).to(dtype) for _ in range(2))
    loud = 30.0 if dtype == torch.float32 else 3.0
    for scale in (1.0, 0.22):
        after = loud * stream + (scale * added).to(dtype)
        assert _adds_up(loud * stream, added, after) == (scale == 1.0)


def test_targets_outlive_the_inputs_that_take_their_place(opened):
    """Without a bias to subtract, the target of a block behind a norm was a view of them."""
    model, tokens = opened("opt_norm_after", "float64"), windows(4)
    block = model.blocks[0]
    block.mlp.consumer.bias = None
    line = Propagation(model, tokens, Auto(iterations=0))
    with torch.no_grad():
        additive = line._run_dense(block)
        expected = line.inputs[:]
        line._hidden(block, additive)
    assert not additive
    assert torch.equal(line.targets[:], expected)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "gpt_neox", "opt_norm_after", "gemma2"])
def test_the_mlp_is_fitted_to_what_brings_the_stream_back(opened, name):
    """W_down = argmin ‖y − x̂ − attention(x̂) − hW‖², or to the dense output behind a norm.

    The mistake: fitting the dense MLP's output, as if the stream had not moved.
    """
    model, dense = opened(name, "float64"), opened(name, "float64")
    run = Run(model)
    run.go(model.blocks[0], mlp_0=16).go(model.blocks[1], mlp_0=16)
    inputs, narrow = states(dense, run.tokens, 1), states(model, run.tokens, 1)
    expected, outputs = look(dense, run.tokens, dense.blocks[1], inputs)
    seen, after = look(model, run.tokens, model.blocks[1], narrow)
    plain = name in ("opt_norm_after", "gemma2")
    target = expected.mlp if plain else outputs - narrow - seen.attention
    bias = getattr(model.blocks[1].mlp.consumer, "bias", None)
    target = target if bias is None else target - bias
    best, found = fitted(seen.hidden, target), model.blocks[1].mlp.consumer_weight
    least = distance(seen.hidden @ best, target)
    assert distance(seen.hidden @ found, target) < 1.001 * least
    assert distance(seen.hidden @ dense.blocks[1].mlp.consumer_weight, target) > 1.1 * least
    if name == "llama":  # channels of full rank, so there is one solution
        torch.testing.assert_close(found, best, rtol=1e-5, atol=1e-6)
    if not plain:
        own = fitted(seen.hidden, expected.mlp if bias is None else expected.mlp - bias)
        assert distance(after, outputs) < 0.95 * distance(seen.hidden @ own, target)


@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("name", ["llama", "opt_no_bias", "gpt_neox_sequential"])
def test_the_output_projection_is_fitted_to_what_brings_the_stream_back(opened, name, size):
    """W_O = argmin ‖x + attention(x) − x̂ − zW‖², with narrow values z or with all of them."""
    model, dense = opened(name, "float64"), opened(name, "float64")
    run = Run(model)
    narrow = {"mlp_0": 16, "value_output_1": size}
    run.go(model.blocks[0], **narrow).go(model.blocks[1], **narrow)
    inputs, moved = states(dense, run.tokens, 1), states(model, run.tokens, 1)
    target = inputs + look(dense, run.tokens, dense.blocks[1], inputs)[0].attention - moved
    seen, _ = look(model, run.tokens, model.blocks[1], moved)
    assert seen.mixed.shape[-1] == size * 4
    best = fitted(seen.mixed, target)
    torch.testing.assert_close(rows(seen.attention), rows(seen.mixed) @ best, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen2", "opt", "gpt2", "gpt_neox"])
def test_narrow_values_leave_their_bias_to_the_output(opened, name):
    model, dense = opened(name, "float64"), opened(name, "float64")
    run = Run(model)
    narrow = {"mlp_0": 16, "value_output_1": 4}
    run.go(model.blocks[0], **narrow).go(model.blocks[1], **narrow)
    inputs, moved = states(dense, run.tokens, 1), states(model, run.tokens, 1)
    target = inputs + look(dense, run.tokens, dense.blocks[1], inputs)[0].attention - moved
    seen, _ = look(model, run.tokens, model.blocks[1], moved)
    attention = model.blocks[1].attention.module
    constant = dense.blocks[1].attention.folded_bias()
    assert attention.v_proj.bias is None
    torch.testing.assert_close(attention.o_proj.bias, constant)
    best = fitted(seen.mixed, target - constant)
    torch.testing.assert_close(
        rows(seen.attention - constant), rows(seen.mixed) @ best, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", ["llama_biased_tied", "qwen2", "opt", "gpt2", "gpt_neox"])
def test_values_of_full_size_keep_what_their_bias_gives(opened, name):
    """The mistake: another output projection, which the bias of the values then goes through.

    Fitting values with their bias, or without it and with a constant beside it, are both right.
    """
    model, dense = opened(name, "float64"), opened(name, "float64")
    run = Run(model)
    run.go(model.blocks[0], mlp_0=16).go(model.blocks[1], mlp_0=16)
    inputs, moved = states(dense, run.tokens, 1), states(model, run.tokens, 1)
    target = inputs + look(dense, run.tokens, dense.blocks[1], inputs)[0].attention - moved
    seen, _ = look(model, run.tokens, model.blocks[1], moved)
    attention = dense.blocks[1].attention.module
    untouched, _ = look(dense, run.tokens, dense.blocks[1], moved)
    least = 0.0
    for z, constant in (
        (
            dense.blocks[1].attention.mixed_values(untouched.mixed),
            dense.blocks[1].attention.folded_bias(),
        ),
        (untouched.mixed, attention.o_proj.bias),
    ):
        wanted = target if constant is None else target - constant
        least = max(least, distance(z @ fitted(z, wanted), wanted))
    assert least < 0.95 * distance(untouched.attention, target)
    assert distance(seen.attention, target) < 1.001 * least


@pytest.mark.parametrize(
    "narrow",
    [
        {"mlp_0": 24},
        {"value_output_0": 4, "query_key_0": 4},
        {"mlp_0": 0},
        {"value_output_0": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", "opt_no_bias", "gpt_neox_sequential"])
def test_later_blocks_of_full_size_bring_the_stream_back(opened, name, narrow):
    """Judged on other text, and against narrowing that the other blocks do not know of."""
    text, other = windows(64), windows(16, seed=1)
    model, dense, apart = (opened(name, "float64") for _ in range(3))
    run = Run(model, text, ridge=1e-4).all(**narrow)
    own = [unit for unit in run.units if unit.block == 0]
    plain = apart.blocks[0]
    statistics = run.store.get(0, run.method.needs)
    with torch.no_grad():
        narrow_block(plain, own, run.sizes(**narrow), run.method, statistics)
    for tokens, most in ((text, 0.95), (other, 1)):
        for blocks in (2, 3):
            goal = states(dense, tokens, blocks)
            found = distance(states(model, tokens, blocks), goal)
            assert 0 < found < most * distance(states(apart, tokens, blocks), goal)


def test_moving_the_producers_too_brings_it_nearer(opened):
    text, found = windows(64), []
    for iterations in (0, 4):
        model = opened("llama", "float64")
        run = Run(model, text, ridge=1e-4, iterations=iterations).all(mlp_0=24, mlp_1=32)
        found.append(distance(run.line.narrow.states, run.line.dense.states))
    assert 0 < found[1] < 0.9 * found[0]


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "opt", "gpt2", "gpt_neox", "phi3"])
def test_the_narrow_stream_is_that_of_the_narrowed_model(opened, name):
    """All kinds of units narrowed in all blocks, and the model's own forward pass."""
    model = opened(name, "float64")
    run = Run(model, ridge=1e-4, iterations=1)
    sizes = {"mlp": 32, "value_output": 5} | ({} if name == "qwen3" else {"query_key": 6})
    run.all(**{f"{kind}_{i}": size for kind, size in sizes.items() for i in range(3)})
    torch.testing.assert_close(run.line.narrow.states, states(model, run.tokens, 3))
    dense = opened(name, "float64")
    torch.testing.assert_close(run.line.dense.states, states(dense, run.tokens, 3))
    assert not torch.allclose(run.line.narrow.states, run.line.dense.states, atol=1e-2)


def test_padding_and_batches_change_nothing(monkeypatch, opened):
    plain, tokens = opened("llama", "float64"), windows(12)
    Run(plain, tokens, ridge=1e-4, iterations=2).all(mlp_0=24, value_output_1=4)
    padding = torch.zeros(12, 5, dtype=torch.int64)
    padded = Tokens(torch.cat((tokens.ids, padding), 1), torch.cat((tokens.mask, padding > 0), 1))
    monkeypatch.setattr("secateur.calibration.layer_stream.TOKENS_PER_BATCH", 5 * 35)
    model = opened("llama", "float64")
    run = Run(model, padded, ridge=1e-4, iterations=2).all(mlp_0=24, value_output_1=4)
    assert len(run.line.dense.batches) == 3
    for one, other in zip(plain.blocks, model.blocks, strict=True):
        for a, b in zip(one.module.parameters(), other.module.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
