"""Rotary pairs by what they add to the output, against autograd and brute force."""

from types import SimpleNamespace

import pytest
import torch

from secateur import Store, calibrate
from secateur.apply.sequential import watched
from secateur.apply.surgery import narrowed
from secateur.calibration.layer_stream import Stream
from secateur.calibration.needs import Needs
from secateur.calibration.pair_scores import PairScores
from secateur.data.tokens import Tokens
from secateur.layers.attention_secateur import rotate
from secateur.methods.cr import CR
from secateur.methods.exact_pairs import ExactPairs
from secateur.structure.narrowing import Narrowing
from tests.support.families import stream
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


def random_forms(seed, kv_heads):
    factor = normal(seed, kv_heads, WIDTH, WIDTH)
    factor = factor * (0.2 + normal(seed + 1, WIDTH).abs())[:, None]
    return factor @ factor.mT


def solved(forms, rotary, ridge=0.0):
    attention = SimpleNamespace(layout=SimpleNamespace(rotary=rotary))
    block = SimpleNamespace(attention_of=lambda _: attention)
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
    attention = model.blocks[0].attention.module
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
