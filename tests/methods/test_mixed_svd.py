"""Rank of values as attention mixes them, against raw tokens and the SVD of unmixed values."""

from types import SimpleNamespace

import pytest
import torch

from secateur import Store, calibrate
from secateur.apply.sequential import watched
from secateur.apply.surgery import narrowed
from secateur.calibration.layer_stream import Stream
from secateur.calibration.needs import Needs
from secateur.calibration.statistics import Cross, Gram, HeadGram
from secateur.data.tokens import Tokens
from secateur.linalg.least_squares import low_rank_in_metric
from secateur.methods.head_svd import HeadSVD
from secateur.methods.mixed_svd import MixedSVD
from tests.support.families import stream

TOKENS, WIDTH, HIDDEN, RIDGE = 120, 5, 9, 1e-10
GROUPED = pytest.mark.parametrize("group", [1, 2, 4])


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def values(seed, kv_heads=2):
    """Values (kv heads, tokens, width) of unequal energy, correlated in heads and between them."""
    made = normal(seed, kv_heads, TOKENS, WIDTH)
    made = made + 0.5 * made.roll(1, 2) + 0.8 * normal(seed + 500, TOKENS, WIDTH)
    return made * (0.2 + normal(seed + 100, kv_heads, 1, WIDTH).abs())


def attention_weights(seed, heads, peaked=3.0):
    later = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    scores = peaked * normal(seed + 200, heads, TOKENS, TOKENS)
    return scores.masked_fill(later, -torch.inf).softmax(-1)


def mixed(value, weights):
    """What the output projection reads: (tokens, heads × width)."""
    group = len(weights) // len(value)
    return (weights @ value.repeat_interleave(group, 0)).transpose(0, 1).flatten(1)


def rows_of(seed, heads):
    """The output projection: (heads, width, hidden)."""
    scales = 0.1 + normal(seed + 400, heads, WIDTH, 1).abs()
    return normal(seed + 300, heads, WIDTH, HIDDEN) * scales


def block(rows, group):
    weight = rows.unflatten(0, (-1, group)).transpose(1, 2).flatten(2)
    module = SimpleNamespace(num_key_value_groups=group)
    attention = SimpleNamespace(output_rows=rows, output_weight=weight, module=module)
    return SimpleNamespace(attention_of=lambda _: attention)


def solved(z, rows, group, target=None, ridge=RIDGE):
    mask = torch.ones(1, TOKENS, dtype=torch.bool)
    found = {Needs.MIXED_GRAM: Gram()}
    found[Needs.MIXED_GRAM].update(z[None], mask=mask)
    if target is not None:
        found[Needs.MIXED_TARGET] = Cross()
        found[Needs.MIXED_TARGET].update(z[None], target[None], mask=mask)
    return MixedSVD(ridge).solve(SimpleNamespace(name="v"), block(rows, group), found)


def from_values(value, rows, group):
    """The method that looks at values before they are mixed."""
    found = {Needs.VALUE_GRAM: HeadGram()}
    found[Needs.VALUE_GRAM].update(
        value.transpose(0, 1)[None], mask=torch.ones(1, TOKENS, dtype=torch.bool)
    )
    return HeadSVD(RIDGE).solve(SimpleNamespace(name="v"), block(rows, group), found)


def encoded(z, encode, group):
    """Narrowed values, mixed: as the map is the same for all tokens, it comes after mixing too."""
    heads = z.unflatten(1, (-1, WIDTH)).transpose(0, 1)
    return (heads @ encode.repeat_interleave(group, 0)).transpose(0, 1).flatten(1)


def error(z, target, narrowing, group):
    """Of the output, in sum over hidden dims and mean over tokens."""
    left = z if narrowing.encode is None else encoded(z, narrowing.encode, group)
    return float((target - left @ narrowing.consumer).square().sum() / TOKENS)


def case(seed, group, kv_heads=2):
    heads = group * kv_heads
    z = mixed(values(seed, kv_heads), attention_weights(seed, heads))
    rows = rows_of(seed, heads)
    return z, rows, z @ rows.flatten(0, 1)


@GROUPED
def test_where_tokens_see_only_themselves_it_is_the_svd_of_values(group):
    """Mixed values are then a copy of the values for every head of a group."""
    value, rows = values(0), rows_of(0, 2 * group)
    z = mixed(value, torch.eye(TOKENS).double().expand(2 * group, -1, -1))
    found, expected = solved(z, rows, group), from_values(value, rows, group)
    torch.testing.assert_close(
        torch.tensor(found.curve.errors), torch.tensor(expected.curve.errors), atol=1e-8, rtol=0
    )
    for size in (1, 3):
        ours, theirs = found.at(size).encode, expected.at(size).encode
        for one, other in zip(ours, theirs, strict=True):
            one, other = torch.linalg.qr(one).Q, torch.linalg.qr(other).Q
            torch.testing.assert_close(one @ one.mT, other @ other.mT, atol=1e-6, rtol=0)


def test_the_whole_map_is_that_of_the_svd_of_values_where_heads_are_uncorrelated():
    """With the same tokens and no other head to lean on, the refit is the decode."""
    value, rows = values(1), rows_of(1, 2)
    both = torch.linalg.qr(value.transpose(0, 1).flatten(1)).Q * (0.2 + normal(5, 10).abs())
    value = both.unflatten(1, (2, WIDTH)).transpose(0, 1)
    found, expected = solved(both, rows, 1), from_values(value, rows, 1)
    for size in (1, 2, 4):
        ours, theirs = found.at(size), expected.at(size)
        torch.testing.assert_close(
            encoded(both, ours.encode, 1) @ ours.consumer,
            encoded(both, theirs.encode, 1) @ theirs.consumer,
            atol=1e-7,
            rtol=1e-6,
        )


@GROUPED
def test_curve_is_the_discarded_energy_of_every_group(group):
    """Σ_{i > k} σ_i² of C_h^½ W_h, the heads of a group below each other as one map."""
    z, rows, _ = case(0, group)
    curve, energies = solved(z, rows, group).curve, torch.zeros(WIDTH).double()
    heads = z.unflatten(1, (-1, WIDTH)).transpose(0, 1).unflatten(0, (-1, group))
    for own, outputs in zip(heads, rows.unflatten(0, (-1, group)), strict=True):
        values, side_by_side = own.flatten(0, 1), outputs.transpose(0, 1).flatten(1)
        _, triangle = torch.linalg.qr(values)  # Σ C_h of the group = RᵀR / tokens
        energies += torch.linalg.svdvals(triangle @ side_by_side).square() / TOKENS
    for size in range(WIDTH + 1):
        expected = float(energies[size:].sum() / energies.sum())
        assert curve.at(size) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_curve_is_the_error_of_one_head(size):
    z, rows, target = case(0, 1, kv_heads=1)
    solution = solved(z, rows, 1)
    share = error(z, target, solution.at(size), 1) / float(target.square().sum() / TOKENS)
    assert solution.curve.at(size) == pytest.approx(share, rel=1e-6)


@GROUPED
@pytest.mark.parametrize("targeted", [False, True])
def test_refit_is_least_squares_from_the_narrowed_values_of_all_heads(group, targeted):
    z, rows, target = case(2, group)
    target = target + normal(3, TOKENS, HIDDEN) if targeted else target
    solution = solved(z, rows, group, target if targeted else None)
    for size in (1, 3):
        narrowing = solution.at(size)
        assert narrowing.encode.shape == (2, WIDTH, size)
        expected = torch.linalg.lstsq(encoded(z, narrowing.encode, group), target).solution
        torch.testing.assert_close(narrowing.consumer, expected, atol=1e-6, rtol=1e-6)


@GROUPED
@pytest.mark.parametrize("seed", range(3))
def test_heads_make_good_what_others_lost(seed, group):
    """The mistake: decoding every KV group for itself."""
    z, rows, target = case(seed, group, kv_heads=4)
    solution = solved(z, rows, group)
    heads = z.unflatten(1, (-1, WIDTH)).transpose(0, 1)
    metric = (heads.mT @ heads / TOKENS).unflatten(0, (-1, group)).sum(1)
    _, decode, _ = low_rank_in_metric(
        metric, block(rows, group).attention_of(None).output_weight, RIDGE
    )
    for size in (1, 2, 4):
        narrowing = solution.at(size)
        alone = (decode[:, :size].repeat_interleave(group, 0) @ rows).flatten(0, 1)
        found = encoded(z, narrowing.encode, group) @ alone
        apart = float((target - found).square().sum() / TOKENS)
        assert error(z, target, narrowing, group) < 0.99 * apart


def test_the_target_is_what_is_fitted():
    """The mistake: rebuilding the heads' own output where something else is wanted."""
    z, rows, own = case(4, 2)
    target = own + 0.5 * z @ normal(5, 4 * WIDTH, HIDDEN)
    right, wrong = solved(z, rows, 2, target), solved(z, rows, 2)
    for size in (2, WIDTH):
        assert error(z, target, right.at(size), 2) < 0.7 * error(z, target, wrong.at(size), 2)


def test_at_full_size_only_the_consumer_changes():
    z, rows, own = case(6, 2)
    target = own + normal(7, TOKENS, HIDDEN)
    narrowing = solved(z, rows, 2, target).at(WIDTH)
    assert narrowing.encode is None
    expected = torch.linalg.lstsq(z, target).solution
    torch.testing.assert_close(narrowing.consumer, expected, atol=1e-6, rtol=1e-6)
    untouched = solved(z, rows, 2, ridge=1e-2).at(WIDTH)
    assert untouched.encode is None
    torch.testing.assert_close(untouched.consumer, rows.flatten(0, 1), atol=1e-10, rtol=1e-10)


def test_nothing_is_left_at_size_zero():
    z, rows, _ = case(6, 2)
    narrowing = solved(z, rows, 2).at(0)
    assert narrowing.encode.shape == (2, WIDTH, 0)
    assert narrowing.consumer.shape == (0, HIDDEN)


@pytest.mark.parametrize("seed", range(3))
def test_values_that_attention_never_reads_do_not_count(seed):
    """The mistake: the Gram of values before mixing, full of tokens that no other looks at.

    Even with the same refit behind it, its basis is the worse one.
    """
    value, rows = values(seed), normal(seed + 300, 4, WIDTH, HIDDEN)
    weights = attention_weights(seed, 4)
    loud = torch.arange(TOKENS) % 5 == 3
    value[..., 0] *= 0.1
    value[:, loud] = 8 * normal(seed + 7, 2, int(loud.sum()), 1) * torch.eye(WIDTH).double()[0]
    weights[:, :, loud] *= 1e-3
    weights /= weights.sum(-1, keepdim=True)
    z = mixed(value, weights)
    target = z @ rows.flatten(0, 1)
    right, blind = solved(z, rows, 2), from_values(value, rows, 2)
    found, wrong, refitted = 0.0, 0.0, 0.0
    for size in (1, 2, 3):
        left = encoded(z, blind.at(size).encode, 2)
        best = left @ torch.linalg.lstsq(left, target).solution
        refitted += float((target - best).square().sum() / TOKENS)
        wrong += error(z, target, blind.at(size), 2)
        found += error(z, target, right.at(size), 2)
    assert found < 0.8 * refitted < 0.8 * wrong


def watched_attention(model, tokens, block):
    windows = Stream(model, tokens)
    with torch.no_grad(), watched(block) as seen:
        windows.through(block, windows.at(slice(None)))
    return seen


@pytest.mark.parametrize("name", ["llama", "llama_biased_tied", "qwen2", "opt", "gpt2", "gpt_neox"])
def test_a_value_bias_takes_no_part_and_is_not_lost(opened, name):
    """It reaches every output whole, so it is a constant there.

    The mistake: a Gram with the bias in it, which spends rank on what is no longer there.
    """
    model, ids = opened(name, "float64"), stream(600).view(20, 30)
    tokens, store = Tokens(ids, torch.ones_like(ids, dtype=torch.bool)), Store()
    block = model.blocks[0]
    attention = block.attention.module
    biased = attention.v_proj.bias is not None
    assert biased is (name != "llama")
    if biased:
        attention.v_proj.bias.data.mul_(5)
    calibrate(model, tokens, frozenset({Needs.MIXED_GRAM}), store)
    statistics = store.get(0, [Needs.MIXED_GRAM])
    seen = watched_attention(model, tokens, block)
    z = seen.mixed.flatten(0, 1)
    if biased:
        heads = attention.v_proj.bias.view(attention.kv_heads, 1, -1)
        bias = heads.expand(-1, attention.num_key_value_groups, -1).flatten()
        z = z - bias
    gram = z.t() @ z / len(z)
    torch.testing.assert_close(statistics[Needs.MIXED_GRAM].mean, gram, rtol=1e-5, atol=1e-8)
    unit = next(u for u in block.units(8) if u.kind == "value_output")
    target = z @ block.attention.output_rows.flatten(0, 1)
    narrowing = MixedSVD(1e-8).solve(unit, block, statistics).at(4)
    full = torch.block_diag(*narrowing.encode.repeat_interleave(attention.num_key_value_groups, 0))
    expected = float((target - z @ full @ narrowing.consumer).square().mean())
    with narrowed(block, unit, narrowing):
        found = watched_attention(model, tokens, block).attention
    lost = float((seen.attention - found).square().mean())
    assert lost == pytest.approx(expected, rel=1e-4)
    if biased:
        wrong = {Needs.MIXED_GRAM: Gram(gram + torch.outer(bias, bias), 1)}
        narrowing = MixedSVD(1e-8).solve(unit, block, wrong).at(4)
        with narrowed(block, unit, narrowing):
            found = watched_attention(model, tokens, block).attention
        assert float((seen.attention - found).square().mean()) > 1.05 * lost
    assert torch.equal(watched_attention(model, tokens, block).attention, seen.attention)
