"""Rotary pairs by what they add to the output, against autograd and brute force."""

from types import SimpleNamespace

import pytest
import torch

from secateur import Store, calibrate
from secateur.apply import narrowed
from secateur.layers.modeling_secateur import rotate
from secateur.methods.base import Narrowing
from secateur.methods.cr import CR
from secateur.methods.exact_pairs import ExactPairs
from secateur.propagate import watched
from secateur.statistics import Needs, PairScores
from secateur.stream import Stream
from secateur.text import Tokens
from tests.families import stream

WIDTH, HALF = 8, 4
ROTARY = pytest.mark.parametrize("rotary", [8, 4, 0])


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def tables(tokens, rotary):
    """Cosines and sines of every pair (tokens, pairs), of which the last may rest."""
    rates = 0.7 ** torch.arange(HALF).double() * (torch.arange(HALF) < rotary // 2)
    angles = torch.arange(tokens)[:, None].double() * rates
    return angles.cos(), angles.sin()


def raw(seed, heads=4, kv_heads=2, tokens=10, hidden=6, batch=2):
    """Queries and keys before rotation, values and output rows: all by head."""
    query = normal(seed, batch, heads, tokens, WIDTH) * 0.6
    key = normal(seed + 100, batch, kv_heads, tokens, WIDTH)
    value = normal(seed + 200, batch, kv_heads, tokens, 3)
    return query, key, value, normal(seed + 300, heads, 3, hidden)


def attention(query, key, value, output, cap=None):
    """What every head adds to the output: (batch, heads, tokens, hidden)."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.mT
    scores = scores if cap is None else cap * (scores / cap).tanh()
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1) @ value @ output


def rescaled(query, coefficients, rotary):
    """Queries whose pairs are scaled and turned by 90°, or whose resting dims are scaled."""
    first, second = query.chunk(2, -1)
    one, other = coefficients.chunk(2, -1)
    turns = torch.arange(HALF) < rotary // 2
    return torch.cat(
        (
            torch.where(turns, one * first - other * second, one * first),
            torch.where(turns, one * second + other * first, other * second),
        ),
        -1,
    )


def neutral(rotary):
    """The coefficients that change nothing."""
    return torch.cat((torch.ones(HALF), (torch.arange(HALF) >= rotary // 2).float())).double()


def changes(query, key, value, output, rotary, cap=None):
    """Derivative of :func:`attention` by every coefficient: (features, batch, heads, …)."""
    cos, sin = tables(query.shape[2], rotary)

    def made(coefficients):
        turned = rotate(rescaled(query, coefficients, rotary), cos, sin)
        return attention(turned, rotate(key, cos, sin), value, output, cap)

    directions = torch.eye(WIDTH).double()
    return torch.stack([torch.func.jvp(made, (neutral(rotary),), (d,))[1] for d in directions])


def form_of(changed, mask, kv_heads):
    """Their inner products over real tokens, summed over the heads of a group."""
    kept = changed.movedim(2, 1)[:, :, mask].flatten(2).transpose(0, 1)  # heads, features, …
    forms = (kept @ kept.mT).unflatten(0, (kv_heads, -1)).sum(1)
    return forms / int(mask.sum())


def fed(query, key, value, output, rotary, mask, cap=None):
    """The statistic, values in a basis in which the output's metric is the identity."""
    cos, sin = tables(query.shape[2], rotary)
    root = torch.linalg.cholesky(output @ output.mT)
    value = value.repeat_interleave(query.shape[1] // key.shape[1], 1) @ root
    turning = torch.arange(HALF) < rotary // 2
    found = PairScores()
    whole = torch.tensor(query.shape[2])
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
    q, rotary, heads = block.attention.q_proj, block.heads.rotary, block.heads.heads
    parts = [q.weight] if q.bias is None else [q.weight, q.bias]
    originals = [part.data.clone() for part in parts]

    def mixed(coefficients):
        for part, original in zip(parts, originals, strict=True):
            rows = rescaled(original.view(heads, WIDTH, -1).mT, coefficients, rotary)
            part.data.copy_(rows.mT.reshape(part.shape))
        with watched(block, until=block.attention.o_proj) as seen:
            windows.through(block, states)
        return seen.mixed

    moved = []
    for direction in 1e-4 * torch.eye(WIDTH).double():
        ends = [mixed(neutral(rotary) + d) for d in (direction, -direction)]
        moved.append((ends[0] - ends[1]) / 2e-4)
    for part, original in zip(parts, originals, strict=True):
        part.data.copy_(original)
    changed = torch.stack(moved).unflatten(-1, (heads, -1)).transpose(2, 3) @ block.output_rows
    return form_of(changed, tokens.mask, block.attention.kv_heads)


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


def test_calibration_stops_when_it_has_seen_enough(monkeypatch, opened):
    """And what the scores project for themselves is no token of another statistic."""
    monkeypatch.setattr("secateur.stream.TOKENS_PER_BATCH", 32)
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


def random_forms(seed, kv_heads):
    factor = normal(seed, kv_heads, WIDTH, WIDTH)
    factor = factor * (0.2 + normal(seed + 1, WIDTH).abs())[:, None]
    return factor @ factor.mT


def solved(forms, rotary, ridge=0.0):
    block = SimpleNamespace(heads=SimpleNamespace(rotary=rotary))
    return ExactPairs(ridge).solve(None, block, {Needs.PAIR_SCORES: PairScores(forms * 7, 7)})


def refitted(form, features, target):
    """Least loss (t − c)ᵀ M (t − c) with c = 0 outside of the features, and its c there."""
    root = torch.linalg.cholesky(form).mT  # ‖root (t − c)‖²
    if not features:
        return float((root @ target).square().sum()), target[:0]
    found = torch.linalg.lstsq(root[:, features], root @ target).solution
    rest = root @ target - root[:, features] @ found
    return float(rest.square().sum()), found


def paired(form, rotary):
    """Features that go together: those that turn by one angle, the rest by their energies."""
    half = rotary // 2
    still = [i for i in range(WIDTH) if i % HALF >= half]
    still.sort(key=lambda i: -float(form[i, i]))
    return [(p, p + HALF) for p in range(half)] + list(zip(still[::2], still[1::2], strict=True))


def greedy(form, rotary):
    """Kept pairs and loss at every number of pairs, by trying each removal."""
    kept, target = paired(form, rotary), neutral(rotary)
    sets, losses = {len(kept): kept}, {len(kept): 0.0}
    while kept:
        tried = []
        for pair in kept:
            rest = [p for p in kept if p != pair]
            tried.append((refitted(form, [i for p in rest for i in p], target)[0], rest))
        losses[len(kept) - 1], kept = min(tried)
        sets[len(kept)] = kept
    return sets, losses


@ROTARY
@pytest.mark.parametrize("seed", range(3))
def test_elimination_is_greedy_by_brute_force(seed, rotary):
    forms = random_forms(10 * seed, 2)
    solution = solved(forms, rotary)
    expected = [greedy(form, rotary) for form in forms]
    whole = sum(losses[0] for _, losses in expected)
    for count in range(HALF + 1):
        loss = sum(losses[count] for _, losses in expected)
        assert solution.curve.at(2 * count) == pytest.approx(loss / whole, abs=1e-9)
        assert count == HALF or solution.curve.at(2 * count + 1) == solution.curve.at(2 * count)
        for keep, (sets, _) in zip(solution.at(2 * count).keep.tolist(), expected, strict=True):
            pairs = zip(keep[:count], keep[count:], strict=True)
            assert set(pairs) == set(sets[count])


@ROTARY
@pytest.mark.parametrize("size", [2, 4, 6])
def test_gains_are_the_best_for_the_kept_pairs(size, rotary):
    """The mistake: keeping every gain at 1 and every angle at 0."""
    forms = random_forms(40, 2)
    narrowing = solved(forms, rotary).at(size)
    for form, keep, encode in zip(forms, narrowing.keep, narrowing.encode, strict=True):
        best, gains = refitted(form, keep.tolist(), neutral(rotary))
        coefficients = torch.zeros(WIDTH).double()
        coefficients[keep] = gains
        queries = normal(3, 5, WIDTH)
        torch.testing.assert_close(
            queries @ encode, rescaled(queries, coefficients, rotary)[:, keep], atol=1e-9, rtol=0
        )
        missed = neutral(rotary)
        missed[keep] = 0
        assert best < 0.95 * float(missed @ form @ missed)


@ROTARY
@pytest.mark.parametrize("ridge", [0.0, 1e-4, 1.0])
def test_at_full_size_queries_stay_as_they_are(rotary, ridge):
    """The ridge pulls gains to 1, so it changes nothing where nothing is lost."""
    narrowing = solved(random_forms(20, 3), rotary, ridge).at(WIDTH)
    for keep, encode in zip(narrowing.keep, narrowing.encode, strict=True):
        assert sorted(keep.tolist()) == list(range(WIDTH))
        assert keep[: rotary // 2].tolist() == list(range(rotary // 2))
        torch.testing.assert_close(encode, torch.eye(WIDTH).double()[:, keep], atol=1e-8, rtol=0)


def test_a_large_ridge_leaves_gains_at_one():
    narrowing = solved(random_forms(20, 1), 8, 1e6).at(4)
    selected = torch.eye(WIDTH).double()[:, narrowing.keep[0]]
    torch.testing.assert_close(narrowing.encode[0], selected, atol=1e-4, rtol=0)


@ROTARY
@pytest.mark.parametrize("size", [2, 4, 6])
def test_mapping_then_turning_is_turning_then_mapping(size, rotary):
    """So that the map can go into the query projection, which positions turn afterwards."""
    narrowing = solved(random_forms(30, 2), rotary).at(size)
    queries, (cos, sin) = normal(31, 12, WIDTH), tables(12, rotary)
    for keep, encode in zip(narrowing.keep, narrowing.encode, strict=True):
        # Resting dims turn by no angle, whichever table column they are looked up at.
        kept = keep[: size // 2].clamp_max(HALF - 1)
        moves = keep[: size // 2] < rotary // 2
        own = torch.where(moves, cos[:, kept], 1), torch.where(moves, sin[:, kept], 0)
        torch.testing.assert_close(
            rotate(queries @ encode, *own), rotate(queries, cos, sin) @ encode
        )
    if rotary == 8:
        mixed = queries @ normal(32, WIDTH, size)  # any other map does not commute
        other = rotate(queries, cos, sin) @ normal(32, WIDTH, size)
        assert not torch.allclose(rotate(mixed, *own), other, atol=1e-2)


def correlated(model, seed):
    """Two loud pairs that hardly turn say nearly the same, and two more something else."""
    attention = model.blocks[0].attention
    for linear in (attention.q_proj, attention.k_proj):
        weight = linear.weight.data.view(-1, WIDTH, linear.weight.shape[1])
        weight.copy_(0.12 * normal(seed, *weight.shape))
        for offset in (0, HALF):
            weight[:, offset + 1] *= 0.3
            weight[:, offset + 2] *= 1.2
            weight[:, offset + 3] *= 0.2
            weight[:, offset + 3] += weight[:, offset + 2]


def lost(model, seed):
    """Mean squared change of a block's attention output, by what the pairs were chosen with."""
    needs = frozenset({Needs.PAIR_SCORES, Needs.QUERY_ENERGY, Needs.KEY_ENERGY})
    block, ids = model.blocks[0], stream(240, seed).view(20, 12)
    tokens, store = Tokens(ids, torch.ones_like(ids, dtype=torch.bool)), Store()
    calibrate(model, tokens, needs, store)
    statistics, windows = store.get(0, needs), Stream(model, tokens)
    unit = next(u for u in block.units(8) if u.kind == "query_key")

    def output():
        with torch.no_grad(), watched(block) as seen:
            windows.through(block, windows.at(slice(None)))
        return seen.attention

    dense, exact = output(), ExactPairs(1e-6).solve(unit, block, statistics).at(4)
    errors = []
    ungained = Narrowing(keep=exact.keep)
    for narrowing in (exact, ungained, CR().solve(unit, block, statistics).at(4)):
        with narrowed(block, unit, narrowing):
            errors.append(float((output() - dense).square().mean()))
    assert torch.equal(output(), dense)
    return errors


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_less_of_the_attention_is_lost_than_by_cr_and_than_without_gains(opened, name):
    """The mistake of CR: of pairs that say the same it keeps both, and loses what others say."""
    errors = []
    for seed in range(4):
        model = opened(name, "float64")
        correlated(model, seed)
        errors.append(lost(model, seed))
    exact, ungained, cr = torch.tensor(errors).t()
    assert bool((exact < 0.3 * ungained).all())
    assert bool((exact < 0.3 * cr).all())


def test_what_is_the_same_for_all_keys_does_not_count():
    """The mistake: raw score products, blind to the softmax, which ignores a constant.

    All pairs add a score that depends on the query alone, the loudest where they say least.
    """
    query, key, value, output = raw(0, heads=1, kv_heads=1, tokens=24)
    query = 0.7 * query
    key = key * torch.tensor([1.0, 0.5, 0.2, 0.05] * 2).double()
    key = key + torch.tensor([0.5, 1.0, 4.0, 8.0] * 2).double()
    mask = torch.ones(2, 24, dtype=torch.bool)
    turning = torch.ones(HALF, dtype=torch.bool)
    found = PairScores()
    metric, whole = torch.linalg.cholesky(output @ output.mT), torch.tensor(query.shape[2])
    found.update(query, key, value @ metric, turning, whole, mask=mask)
    one, other = query.chunk(2, -1), key.chunk(2, -1)
    first = torch.einsum("bhtp,bhsp->bhpts", one[0], other[0])
    first = first + torch.einsum("bhtp,bhsp->bhpts", one[1], other[1])
    second = torch.einsum("bhtp,bhsp->bhpts", one[0], other[1])
    second = second - torch.einsum("bhtp,bhsp->bhpts", one[1], other[0])
    products = torch.cat((first, second), 2)
    later = torch.ones(24, 24, dtype=torch.bool).triu(1)
    weights = (query @ key.mT).masked_fill(later, -torch.inf).softmax(-1)
    added = (weights.unsqueeze(2) * products) @ (value @ output).unsqueeze(2)
    blind = torch.einsum("bhptd,bhrtd->pr", added, added)[None] / 48
    right, wrong = solved(found.mean, 8, 1e-9), solved(blind, 8, 1e-9)
    assert int(wrong.at(2).keep[0, 0]) == 3
    assert int(right.at(2).keep[0, 0]) != 3
    dense = attention(query, key, value, output)

    def missed(narrowing):
        keep, encode = narrowing.keep[0], narrowing.encode[0]
        return float((attention(query @ encode, key[..., keep], value, output) - dense).norm())

    for size in (2, 4):
        assert missed(right.at(size)) < 0.7 * missed(wrong.at(size))
