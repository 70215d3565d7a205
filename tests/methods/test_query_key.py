"""CR scores, against the published square roots and raw tokens."""

from types import SimpleNamespace

import pytest
import torch

from secateur.calibration.needs import Needs
from secateur.calibration.statistics import Energy
from secateur.linalg.least_squares import roots
from secateur.methods.cr import CR


def raw(seed, heads=4, kv_heads=2, width=8, tokens=120):
    generator = torch.Generator().manual_seed(seed)

    def made(count):
        scale = 0.2 + 2 * torch.rand(count, width, generator=generator).double()
        mix = torch.randn(count, width, width, generator=generator).double() * 0.4
        mix = mix + torch.eye(width)
        fresh = torch.randn(1, tokens, count, width, generator=generator).double()
        return torch.einsum("bthi,hij->bthj", fresh, mix) * scale

    return made(heads), made(kv_heads)


def statistics(query, key):
    found = {Needs.QUERY_ENERGY: Energy(), Needs.KEY_ENERGY: Energy()}
    mask = torch.ones(query.shape[:2], dtype=torch.bool)
    found[Needs.QUERY_ENERGY].update(query, mask=mask)
    found[Needs.KEY_ENERGY].update(key, mask=mask)
    return found


def block(rotary):
    attention = SimpleNamespace(layout=SimpleNamespace(rotary=rotary))
    return SimpleNamespace(attention_of=lambda _: attention)


def kept(query, key, size, rotary):
    return CR().solve(None, block(rotary), statistics(query, key)).at(size).keep


def gram_of(rows):
    return rows.t() @ rows / len(rows)


def published(query, key, column_norms):
    """Squared scores (kv heads, width): over the group, Σ ‖C_q^½ e_i‖² ‖C_k^½ e_i‖²."""
    group = query.shape[2] // key.shape[2]
    scores = torch.zeros(key.shape[2], key.shape[3]).double()
    for head in range(query.shape[2]):
        q = column_norms(gram_of(query[0, :, head]))
        k = column_norms(gram_of(key[0, :, head // group]))
        scores[head // group] += q.square() * k.square()
    return scores


def symmetric(gram):
    return roots(gram, 0.0)[0].norm(dim=0)


def cholesky(gram):
    return torch.linalg.cholesky(gram).norm(dim=0)


@pytest.mark.parametrize("seed", range(4))
def test_unrotated_coordinates_rank_by_the_published_score(seed):
    """The mistake: column norms of a Cholesky factor are another score."""
    query, key = raw(seed)
    right, wrong = (published(query, key, norms) for norms in (symmetric, cholesky))
    for size in (2, 4, 6):
        found = kept(query, key, size, 0).sort(1).values
        expected = right.argsort(1, descending=True)[:, :size].sort(1).values
        assert torch.equal(found, expected)
    assert not torch.equal(right.argsort(1), wrong.argsort(1))


@pytest.mark.parametrize("seed", range(4))
def test_pair_score_is_the_mean_over_all_rotations(seed):
    """What a pair adds to the squared scores, averaged over the angle between two tokens."""
    query, key = raw(seed, heads=1, kv_heads=1, tokens=40)
    scores, pairs = CR()._ranked(block(8).attention_of(None), statistics(query, key))
    angles = torch.arange(64).double() * 2 * torch.pi / 64
    for score, (i, j) in zip(scores[0], pairs[0].tolist(), strict=True):
        q, k = query[0, :, 0][:, [i, j]], key[0, :, 0][:, [i, j]]
        total = 0.0
        for angle in angles:
            c, s = angle.cos(), angle.sin()
            turned = torch.stack((k[:, 0] * c - k[:, 1] * s, k[:, 0] * s + k[:, 1] * c), 1)
            total += float((q @ turned.t()).square().mean()) / len(angles)
        assert float(score) == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("rotary", [8, 4])
def test_scores_do_not_change_when_tokens_turn(rotary):
    query, key = raw(1)
    before = CR()._ranked(block(rotary).attention_of(None), statistics(query, key))
    generator = torch.Generator().manual_seed(0)
    angle = torch.rand(1, 120, 1, 4, generator=generator).double() * 6.28
    angle[..., rotary // 2 :] = 0

    def turned(x):
        first, second = x.chunk(2, -1)
        c, s = angle.cos(), angle.sin()
        return torch.cat((first * c - second * s, second * c + first * s), -1)

    after = CR()._ranked(block(rotary).attention_of(None), statistics(turned(query), turned(key)))
    torch.testing.assert_close(before[0], after[0])
    assert torch.equal(before[1], after[1])
    single = (query.square().mean((0, 1)), turned(query).square().mean((0, 1)))
    assert not torch.allclose(*single)  # the energies of single coordinates do change


@pytest.mark.parametrize("rotary", [8, 4, 0])
@pytest.mark.parametrize("size", [2, 4, 6, 8])
def test_kept_coordinates_are_distinct_whole_pairs(rotary, size):
    query, key = raw(2)
    keep = kept(query, key, size, rotary)
    assert keep.shape == (2, size)
    for row in keep.tolist():
        assert len(set(row)) == size
        for first, second in zip(row[: size // 2], row[size // 2 :], strict=True):
            if first < rotary // 2:
                assert second == first + 4
            else:
                assert all(c % 4 >= rotary // 2 for c in (first, second))


def test_one_index_set_for_all_query_heads_of_a_group():
    """The loudest pair of one query head counts in its own group only."""
    query, key = raw(3)
    query, key = torch.ones_like(query), torch.ones_like(key)
    query[..., 1, 2] = 30  # head 1 reads KV head 0
    query[..., 3, 5] = 30  # head 3 reads KV head 1
    assert kept(query, key, 2, 8).tolist() == [[2, 6], [1, 5]]


def test_resting_coordinates_rank_by_their_own_energies():
    """The mistake: ranking the half at rest by the scores of the half that turns."""
    query, key = raw(4, heads=1, kv_heads=1)
    query, key = torch.ones_like(query), torch.ones_like(key)
    for coordinate in (3, 6):  # both at rest, and no pair of each other
        query[..., coordinate] = key[..., coordinate] = 5
    keep = kept(query, key, 2, 4)
    assert sorted(keep[0].tolist()) == [3, 6]


def test_a_quiet_key_silences_a_loud_query():
    query, key = raw(5, heads=1, kv_heads=1)
    query, key = torch.ones_like(query), torch.ones_like(key)
    query[..., [0, 4]], key[..., [0, 4]] = 10, 0.01
    query[..., [1, 5]] = key[..., [1, 5]] = 1.5
    assert kept(query, key, 2, 8).tolist() == [[1, 5]]


@pytest.mark.parametrize("rotary", [8, 4, 0])
def test_curve_is_the_removed_share_of_all_scores(rotary):
    query, key = raw(6)
    scores, _ = CR()._ranked(block(rotary).attention_of(None), statistics(query, key))
    curve = CR().solve(None, block(rotary), statistics(query, key)).curve
    for size in range(0, 9, 2):
        expected = float(scores[:, size // 2 :].sum() / scores.sum())
        assert curve.at(size) == pytest.approx(expected, abs=1e-12)
