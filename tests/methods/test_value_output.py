"""Rank of a head's value/output map, against raw tokens and the published construction."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.linalg.least_squares import low_rank_in_metric, roots

seeds = st.integers(0, 2**31 - 1)


def planted(seed, hidden=12, width=6, group=2, tokens=80):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(tokens, hidden) * (0.2 + 2 * torch.rand(hidden, generator=generator).double())
    scales = 0.1 + 2 * torch.rand(width, 1, generator=generator).double()
    return x, normal(hidden, width), normal(width, group * hidden) * scales


def gram_of(z):
    return z.t() @ z / len(z)


def error(z, w, rebuilt):
    return float((z @ w - rebuilt).square().sum() / len(z))


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(2, 7), st.integers(1, 3))
def test_error_of_every_rank_is_the_sum_of_discarded_energies(seed, width, group):
    x, value, output = planted(seed, width=width, group=group)
    z = x @ value
    encode, decode, energies = low_rank_in_metric(gram_of(z), output, 0.0)
    assert bool((energies[:-1] >= energies[1:]).all())
    for k in range(width + 1):
        found = error(z, output, z @ encode[:, :k] @ decode[:k] @ output)
        expected = float(energies[k:].sum())
        assert found == pytest.approx(expected, rel=1e-8, abs=1e-8 * float(energies.sum()))
    torch.testing.assert_close(encode @ decode, torch.eye(width).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", range(4))
def test_error_is_that_of_the_published_two_decompositions(seed):
    x, value, output = planted(seed)
    covariance = gram_of(x)
    root, inverse = roots(covariance, 0.0)
    u, s, vt = torch.linalg.svd(root @ value, full_matrices=False)
    u2, s2, vt2 = torch.linalg.svd(s.diag() @ vt @ output, full_matrices=False)
    z = x @ value
    encode, decode, energies = low_rank_in_metric(gram_of(z), output, 0.0)
    torch.testing.assert_close(energies, s2.square(), rtol=1e-8, atol=1e-9)
    for k in (1, 3, 5):
        published = x @ (inverse @ u @ u2[:, :k]) @ (s2[:k].diag() @ vt2[:k])
        ours = z @ encode[:, :k] @ decode[:k] @ output
        torch.testing.assert_close(ours, published, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("seed", range(4))
def test_no_other_projection_of_the_same_rank_does_better(seed):
    x, value, output = planted(seed)
    z = x @ value
    encode, decode, energies = low_rank_in_metric(gram_of(z), output, 0.0)
    generator = torch.Generator().manual_seed(seed)
    for scale in (1e-3, 1e-1, 1.0):
        e = encode[:, :3] + scale * torch.randn(6, 3, generator=generator).double()
        d = decode[:3] + scale * torch.randn(3, 6, generator=generator).double()
        assert error(z, output, z @ e @ d @ output) > float(energies[3:].sum())


@pytest.mark.parametrize("seed", range(4))
def test_invariant_under_rebasing_a_head(seed):
    """W_V T with T⁻¹ W_O is the same map, and is approximated by the same one."""
    x, value, output = planted(seed)
    change = torch.randn(6, 6, generator=torch.Generator().manual_seed(seed)).double()
    change = change + 3 * torch.eye(6)
    maps = []
    for v, o in ((value, output), (value @ change, torch.linalg.solve(change, output))):
        encode, decode, energies = low_rank_in_metric(gram_of(x @ v), o, 0.0)
        maps.append((v @ encode[:, :2] @ decode[:2] @ o, energies))
    torch.testing.assert_close(maps[0][0], maps[1][0], atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(maps[0][1], maps[1][1], atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("seed", range(4))
def test_ignoring_the_outputs_is_worse(seed):
    """The mistake: a decomposition of W_V alone, blind to what W_O reads."""
    x, value, output = planted(seed)
    z = x @ value
    gram = gram_of(z)
    blind = low_rank_in_metric(gram, torch.eye(6).double(), 0.0)
    energies = low_rank_in_metric(gram, output, 0.0)[2]
    for k in (1, 2, 4):
        found = error(z, output, z @ blind[0][:, :k] @ blind[1][:k] @ output)
        assert found > 1.01 * float(energies[k:].sum())


@pytest.mark.parametrize("seed", range(4))
def test_all_query_heads_of_a_group_are_seen(seed):
    """The mistake: only the first query head's W_O decides for the KV head."""
    x, value, output = planted(seed)
    z = x @ value
    first = low_rank_in_metric(gram_of(z), output[:, :12], 0.0)
    energies = low_rank_in_metric(gram_of(z), output, 0.0)[2]
    found = error(z, output, z @ first[0][:, :3] @ first[1][:3] @ output)
    assert found > 1.001 * float(energies[3:].sum())


def test_batched_equals_one_by_one():
    grams, outputs = zip(
        *((gram_of(x @ v), o) for x, v, o in (planted(seed) for seed in range(3))), strict=True
    )
    together = low_rank_in_metric(torch.stack(grams), torch.stack(outputs), 1e-6)
    for i in range(3):
        alone = low_rank_in_metric(grams[i], outputs[i], 1e-6)
        torch.testing.assert_close(together[2][i], alone[2], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            together[0][i, :, :3] @ together[1][i, :3], alone[0][:, :3] @ alone[1][:3]
        )


def test_roots_square_to_the_gram_and_its_inverse():
    x, value, _ = planted(0)
    gram = gram_of(x @ value)
    root, inverse = roots(gram, 0.0)
    torch.testing.assert_close(root @ root, gram)
    torch.testing.assert_close(root, root.mT)
    torch.testing.assert_close(root @ inverse, torch.eye(6).double(), atol=1e-8, rtol=0)


def test_a_gram_without_full_rank_still_has_finite_maps():
    x, value, output = planted(0)
    value[:, 2] = value[:, 1]
    z = x @ value
    encode, decode, energies = low_rank_in_metric(gram_of(z), output, 1e-6)
    assert bool(encode.isfinite().all() and decode.isfinite().all())
    assert error(z, output, z @ encode[:, :5] @ decode[:5] @ output) < 1e-4 * float(energies.sum())
