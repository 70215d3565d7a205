"""Attention by hand, and what a change of its queries does to it."""

import pytest
import torch

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


def attention(query, key, value, output, cap=None, causal=True):
    """What every head adds to the output: (batch, heads, tokens, hidden)."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.mT
    scores = scores if cap is None else cap * (scores / cap).tanh()
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    scores = scores.masked_fill(later, -torch.inf) if causal else scores
    return scores.softmax(-1) @ value @ output


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
