"""The quadratic form of the scores of query/key pairs, against autograd and differences."""

import pytest
import torch

from secateur import Store, calibrate
from secateur.apply.sequential import watched
from secateur.calibration.layer_stream import Stream
from secateur.calibration.needs import Needs
from secateur.calibration.pair_scores import PairScores
from secateur.data.tokens import Tokens
from secateur.evaluate.verify import attend_by
from secateur.layers.attention_secateur import rotate
from tests.support.families import read, stream
from tests.support.pairs import (
    HALF,
    ROTARY,
    WIDTH,
    attention,
    neutral,
    normal,
    raw,
    rescaled,
    tables,
)


def changes(query, key, value, output, rotary, cap=None, causal=True):
    """Derivative of :func:`attention` by every coefficient: (features, batch, heads, …)."""
    cos, sin = tables(query.shape[2], rotary)

    def made(coefficients):
        turned = rotate(rescaled(query, coefficients, rotary), cos, sin)
        return attention(turned, rotate(key, cos, sin), value, output, cap, causal)

    directions = torch.eye(WIDTH).double()
    return torch.stack([torch.func.jvp(made, (neutral(rotary),), (d,))[1] for d in directions])


def form_of(changed, mask, kv_heads):
    """Their inner products over real tokens, summed over the heads of a group."""
    kept = changed.movedim(2, 1)[:, :, mask].flatten(2).transpose(0, 1)  # heads, features, …
    forms = (kept @ kept.mT).unflatten(0, (kv_heads, -1)).sum(1)
    return forms / int(mask.sum())


def fed(query, key, value, output, rotary, mask, cap=None, causal=True):
    """The statistic, values in a basis in which the output's metric is the identity."""
    cos, sin = tables(query.shape[2], rotary)
    root = torch.linalg.cholesky(output @ output.mT)
    value = value.repeat_interleave(query.shape[1] // key.shape[1], 1) @ root
    turning = torch.arange(HALF) < rotary // 2
    found = PairScores()
    whole = torch.tensor(query.shape[2] if causal else 0)
    caps = () if cap is None else (torch.tensor(cap).double(),)
    turned = (rotate(query, cos, sin), rotate(key, cos, sin))
    found.update(*turned, value, turning, whole, *caps, mask=mask)
    return found


def padded(batch, tokens, missing=3):
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    mask[-1, tokens - missing :] = False
    return mask


@ROTARY
@pytest.mark.parametrize(("kv_heads", "cap"), [(4, None), (2, None), (1, None), (2, 1.5)])
def test_form_is_the_squared_change_by_autograd(rotary, kv_heads, cap):
    """Through cap, softmax and the output projection, for every pair of coefficients."""
    parts, mask = raw(rotary, kv_heads=kv_heads), padded(2, 10)
    found = fed(*parts, rotary, mask, cap)
    changed = changes(*parts, rotary, cap)
    torch.testing.assert_close(found.mean, form_of(changed, mask, kv_heads))
    assert found.tokens == 17
    torch.testing.assert_close(found.mean, found.mean.mT, rtol=1e-12, atol=1e-12)
    assert bool((torch.linalg.eigvalsh(found.mean) > -1e-9).all())
    everything = form_of(changed, torch.ones_like(mask), kv_heads)
    assert not torch.allclose(found.mean, everything, rtol=1e-3)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_form_of_attention_to_both_sides(kv_heads):
    """The mistake: a causal mask, which such a model has not."""
    parts, mask = raw(3, kv_heads=kv_heads), torch.ones(2, 10, dtype=torch.bool)
    expected = form_of(changes(*parts, 0, causal=False), mask, kv_heads)
    torch.testing.assert_close(fed(*parts, 0, mask, causal=False).mean, expected)
    assert not torch.allclose(fed(*parts, 0, mask).mean, expected, rtol=1e-2)


@ROTARY
def test_form_predicts_what_a_small_change_does(rotary):
    """Any coefficients at once, the same in a group; per head, as heads are not added up."""
    query, key, value, output = raw(5)
    mask, cos, sin = padded(2, 10), *tables(10, rotary)
    form = fed(query, key, value, output, rotary, mask).mean
    step = 1e-5 * normal(6, 2, 1, WIDTH)
    turned = rotate(key, cos, sin)
    coefficients = neutral(rotary) + step.repeat_interleave(2, 0)  # heads, 1, features
    moved = rotate(rescaled(query, coefficients, rotary), cos, sin)
    after = attention(moved, turned, value, output)
    before = attention(rotate(query, cos, sin), turned, value, output)
    error = (after - before).transpose(1, 2)[mask].square().sum() / int(mask.sum())
    predicted = float((step @ form @ step.mT).sum())
    assert float(error) == pytest.approx(predicted, rel=1e-3)


def test_batches_add_up_and_merge():
    query, key, value, output = raw(1, batch=5)
    mask = padded(5, 10, 6)
    whole = fed(query, key, value, output, 8, mask)
    one, other = (
        fed(query[cut], key[cut], value[cut], output, 8, mask[cut])
        for cut in (slice(2), slice(2, 5))
    )
    one.merge(other)
    assert one.tokens == whole.tokens == 44
    torch.testing.assert_close(one.mean, whole.mean)


def finite_differences(model, tokens, block):
    """:func:`form_of` the model's own attention, whose query weights are moved a little."""
    windows = Stream(model, tokens)
    states = windows.at(slice(None))
    for before in model.blocks[: block.index]:
        states = windows.through(before, states)
    q, rotary, heads = block.attention.module.q_proj, block.layout.rotary, block.layout.heads
    parts = [q.weight] if q.bias is None else [q.weight, q.bias]
    originals = [part.data.clone() for part in parts]

    def mixed(coefficients):
        for part, original in zip(parts, originals, strict=True):
            rows = rescaled(original.view(heads, WIDTH, -1).mT, coefficients, rotary)
            part.data.copy_(rows.mT.reshape(part.shape))
        with watched(block, until=block.attention.module.o_proj) as seen:
            windows.through(block, states)
        return seen.mixed

    moved = []
    for direction in 1e-4 * torch.eye(WIDTH).double():
        ends = [mixed(neutral(rotary) + d) for d in (direction, -direction)]
        moved.append((ends[0] - ends[1]) / 2e-4)
    for part, original in zip(parts, originals, strict=True):
        part.data.copy_(original)
    changed = (
        torch.stack(moved).unflatten(-1, (heads, -1)).transpose(2, 3) @ block.attention.output_rows
    )
    return form_of(changed, tokens.mask, block.attention.module.kv_heads)


@pytest.mark.parametrize(
    "name",
    [
        *("llama", "mistral", "qwen2", "phi3_partial", "gpt_neox", "opt", "gpt2_scaled"),
        *("gemma2", "cohere", "cohere2", "falcon"),
    ],
)
def test_calibration_measures_the_models_own_attention(opened, name):
    """Its softmax scale, rotary tables, biases, output projection, window and soft-capping."""
    model, ids = opened(name, "float64"), stream(48).view(3, 16)
    tokens, store = Tokens(ids, padded(3, 16, 5)), Store()
    calibrate(model, tokens, frozenset({Needs.PAIR_SCORES}), store)
    found = store.get(1, [Needs.PAIR_SCORES])[Needs.PAIR_SCORES]
    assert found.tokens == 43
    with torch.no_grad():
        expected = finite_differences(model, tokens, model.blocks[1])
    coarse = 100 if name == "gemma2" else 1  # eager attention takes the softmax in float32
    tolerance = {"rtol": 1e-4 * coarse, "atol": 1e-6 * coarse * float(expected.max())}
    torch.testing.assert_close(found.mean, expected, **tolerance)


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_calibration_measures_attention_to_both_sides(opened, name):
    """The mistake put back: attention taken for a causal one."""
    model, tokens = opened(name, "float64"), read(name, 2, 16)
    with torch.no_grad():
        expected = finite_differences(model, tokens, model.blocks[1])

    def measured():
        store = Store()
        calibrate(model, tokens, frozenset({Needs.PAIR_SCORES}), store)
        return store.get(1, [Needs.PAIR_SCORES])[Needs.PAIR_SCORES].mean

    tolerance = {"rtol": 1e-4, "atol": 1e-6 * float(expected.max())}
    torch.testing.assert_close(measured(), expected, **tolerance)
    attend_by(model.module, "eager")  # which is given no mask, whatever the module says
    model.blocks[1].attention.module.is_causal = True
    assert not torch.allclose(measured(), expected, rtol=1e-2)


def test_calibration_stops_when_it_has_seen_enough(monkeypatch, opened):
    """And what the scores project for themselves is no token of another statistic."""
    monkeypatch.setattr("secateur.calibration.layer_stream.TOKENS_PER_BATCH", 32)
    monkeypatch.setattr("secateur.calibration.layer_stream.BATCHES", 1)
    monkeypatch.setattr(PairScores, "most_tokens", 40)
    model, ids = opened("llama", "float64"), stream(80).view(5, 16)
    needs = frozenset({Needs.PAIR_SCORES, Needs.QUERY_ENERGY, Needs.HIDDEN_GRAM})

    def measured(rows, needs):
        store = Store()
        calibrate(model, Tokens(ids[:rows], ids[:rows] >= 0), needs, store)
        return store.get(1, needs)

    found, first = measured(5, needs), measured(4, needs)
    plain = measured(5, frozenset({Needs.QUERY_ENERGY}))
    assert found[Needs.PAIR_SCORES].tokens == 64  # two batches of two windows
    torch.testing.assert_close(found[Needs.PAIR_SCORES].mean, first[Needs.PAIR_SCORES].mean)
    assert found[Needs.HIDDEN_GRAM].tokens == found[Needs.QUERY_ENERGY].tokens == 80
    assert torch.equal(found[Needs.QUERY_ENERGY].mean, plain[Needs.QUERY_ENERGY].mean)
