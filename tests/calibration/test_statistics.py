"""Streaming sums: batches, merging, padding, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur import InputError, Store, calibrate
from secateur.calibration.layer_stream import TOKENS_PER_BATCH
from secateur.calibration.needs import Needs
from secateur.calibration.statistics import Cross, Energy, Gram, HeadGram, Influence
from secateur.data.tokens import Tokens
from tests.support.families import NORMED, stream

KINDS = {Gram: (5,), Energy: (3, 4), HeadGram: (3, 4), Influence: (2, 6)}
every_kind = pytest.mark.parametrize("kind", KINDS)


def batch(kind, windows, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(windows, length, *KINDS[kind], generator=generator).double()
    return values, torch.rand(windows, length, generator=generator) < 0.7


def feed(statistic, values, mask):
    parts = values.unbind(2) if isinstance(statistic, Influence) else (values,)
    statistic.update(*parts, mask=mask)


def direct(kind, values, mask):
    rows = values[mask]
    if kind is Gram:
        return torch.einsum("ti,tj->ij", rows, rows) / len(rows)
    if kind is HeadGram:
        return torch.einsum("thi,thj->hij", rows, rows) / len(rows)
    if kind is Energy:
        return (rows**2).mean(0)
    dot = (rows[:, 0] * rows[:, 1]).sum(-1)
    return 1 - (dot / rows[:, 0].norm(dim=-1) / rows[:, 1].norm(dim=-1)).mean()


@every_kind
def test_mean_is_the_definition(kind):
    values, mask = batch(kind, 4, 9)
    statistic = kind()
    feed(statistic, values, mask)
    assert statistic.tokens == int(mask.sum())
    torch.testing.assert_close(statistic.mean, direct(kind, values, mask))


@every_kind
@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(1, 7), max_size=3), seed=st.integers(0, 99))
def test_streaming_equals_one_batch(kind, cuts, seed):
    values, mask = batch(kind, 8, 5, seed)
    streamed = kind()
    for part, own in zip(
        values.tensor_split(sorted(cuts)), mask.tensor_split(sorted(cuts)), strict=True
    ):
        feed(streamed, part, own)
    torch.testing.assert_close(streamed.mean, direct(kind, values, mask))


@every_kind
def test_merge_is_associative_and_equals_pooling(kind):
    values, mask = batch(kind, 9, 6)

    def part(i):
        made = kind()
        feed(made, values[3 * i : 3 * i + 3], mask[3 * i : 3 * i + 3])
        return made

    left, right, tail = part(0), kind(), part(1)
    left.merge(part(1))
    left.merge(part(2))
    tail.merge(part(2))
    right.merge(part(0))
    right.merge(tail)
    assert left.tokens == right.tokens == int(mask.sum())
    torch.testing.assert_close(left.mean, right.mean)
    torch.testing.assert_close(left.mean, direct(kind, values, mask))
    before = left.mean.clone()
    left.merge(kind())
    torch.testing.assert_close(left.mean, before)


@every_kind
def test_merging_leaves_the_other_as_it_was(kind):
    one, other, values = kind(), kind(), batch(kind, 2, 5)
    feed(other, *values)
    before = other.total.clone()
    one.merge(other)
    feed(one, *values)
    assert torch.equal(other.total, before)


@every_kind
def test_what_padding_holds_never_counts(kind):
    values, mask = batch(kind, 4, 6)
    clean, dirty = kind(), kind()
    feed(clean, values, mask)
    values = values.clone()
    values[~mask] = float("nan")
    feed(dirty, values, mask)
    assert torch.equal(clean.mean, dirty.mean)


@every_kind
def test_no_token_and_nan_are_refused(kind):
    with pytest.raises(InputError, match="no token"):
        _ = kind().mean
    values, mask = batch(kind, 2, 5)
    mask[0, 0] = True
    values[0, 0] = float("nan")
    broken = kind()
    feed(broken, values, mask)
    with pytest.raises(InputError, match="NaN"):
        _ = broken.mean
    nothing = kind()
    feed(nothing, values, torch.zeros_like(mask))
    with pytest.raises(InputError, match="no token"):
        _ = nothing.mean


# Targets are known only behind blocks that are already narrowed.
NEEDS = frozenset(v for v in vars(Needs).values() if isinstance(v, tuple) and v.kind is not Cross)


def measured(model, ids, mask, store=None):
    store = store or Store()
    calibrate(model, Tokens(ids, mask), NEEDS, store)
    return [store.get(block.index, NEEDS) for block in model.blocks]


def missing(model, name):
    """Places that a family doesn't have."""
    turns = model.anatomy.pre_norm is not None  # a place between attention and MLP
    return ({"scores"} if name in NORMED else set()) | (set() if turns else {"between"})


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "opt", "gpt2", "gpt_neox"])
def test_padded_windows_give_the_statistics_of_unpadded_ones(opened, name):
    model = opened(name, "float64")
    ids = stream(40).view(2, 20)
    mask = torch.ones_like(ids, dtype=torch.bool)
    padded = torch.cat((ids, torch.zeros(2, 7, dtype=torch.int64)), 1)
    padded_mask = torch.cat((mask, torch.zeros(2, 7, dtype=torch.bool)), 1)
    pairs = zip(measured(model, ids, mask), measured(model, padded, padded_mask), strict=True)
    for plain, other in pairs:
        assert set(plain) == {n for n in NEEDS if n.site.side not in missing(model, name)}
        for need in plain:
            assert plain[need].tokens == other[need].tokens == 40
            torch.testing.assert_close(plain[need].mean, other[need].mean, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_batches_do_not_change_statistics(monkeypatch, opened, name):
    """Uneven batches: the last one is shorter, and each shape has its own masks."""
    model = opened(name, "float64")
    ids = stream(5 * 16).view(5, 16)
    mask = torch.ones_like(ids, dtype=torch.bool)
    assert ids.numel() < TOKENS_PER_BATCH
    whole = measured(model, ids, mask)
    monkeypatch.setattr("secateur.calibration.layer_stream.TOKENS_PER_BATCH", 32)
    for one, other in zip(whole, measured(model, ids, mask), strict=True):
        assert (
            set(one) == set(other) == {n for n in NEEDS if n.site.side not in missing(model, name)}
        )
        for need in one:
            torch.testing.assert_close(one[need].mean, other[need].mean, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3_partial", "gpt2", "gpt_neox"])
def test_one_pass_sees_what_the_whole_model_computes(opened, name):
    """Block by block is the plain forward pass; token counts come from the mask alone."""
    model = opened(name, "float64")
    ids = stream(60).view(3, 20)
    found = measured(model, ids, torch.ones_like(ids, dtype=torch.bool))
    seen = {}
    for block in model.blocks:
        places = {
            "hidden": (block.mlp.consumer, lambda args, _: args[0]),
            "query": (block.attention.module.q_proj, lambda _, out: out),
            "value": (block.attention.module.v_proj, lambda _, out: out),
        }
        for place, (module, read) in places.items():
            key = (block.index, place)
            module.register_forward_hook(lambda _, a, o, k=key, r=read: seen.update({k: r(a, o)}))
    out = model.module(input_ids=ids, output_hidden_states=True, use_cache=False)
    states = out.hidden_states
    for i, (block, own) in enumerate(zip(model.blocks, found, strict=True)):
        hidden = seen[i, "hidden"].reshape(60, -1)
        gram = hidden.t() @ hidden / 60
        torch.testing.assert_close(own[Needs.HIDDEN_GRAM].mean, gram, rtol=1e-5, atol=1e-8)
        query = seen[i, "query"].reshape(60, block.layout.heads, -1).square().mean(0)
        torch.testing.assert_close(own[Needs.QUERY_ENERGY].mean, query, rtol=1e-5, atol=1e-8)
        bias = block.attention.module.v_proj.bias
        value = seen[i, "value"] - (0 if bias is None else bias)
        value = value.reshape(60, block.layout.kv_heads, -1)
        grams = torch.einsum("thi,thj->hij", value, value) / 60
        torch.testing.assert_close(own[Needs.VALUE_GRAM].mean, grams, rtol=1e-5, atol=1e-8)
        if i + 1 < len(model.blocks):  # the last one is given out behind the final norm
            cosine = torch.cosine_similarity(states[i], states[i + 1], -1)
            expected = 1 - cosine.double().mean()
            torch.testing.assert_close(own[Needs.INFLUENCE].mean, expected, rtol=1e-5, atol=1e-7)


def test_a_store_on_disk_gives_back_what_it_took(tmp_path, opened):
    model, ids = opened("llama"), stream(40).view(2, 20)
    mask = torch.ones_like(ids, dtype=torch.bool)
    disk = Store(tmp_path / "statistics")
    assert 0 not in disk
    kept = measured(model, ids, mask, disk)
    for one, other in zip(kept, measured(model, ids, mask), strict=True):
        for need in NEEDS:
            assert one[need].tokens == other[need].tokens
            assert torch.equal(one[need].total, other[need].total)
    assert 2 in Store(tmp_path / "statistics")
    assert not list((tmp_path / "statistics").glob("*.partial"))


def test_broken_activations_are_refused(opened):
    model = opened("llama")
    model.blocks[1].mlp.consumer.weight.data[0, 0] = float("inf")
    ids = stream(20).view(1, 20)
    with pytest.raises(InputError, match="NaN or infinite"):
        measured(model, ids, torch.ones_like(ids, dtype=torch.bool))
