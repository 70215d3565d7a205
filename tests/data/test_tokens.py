"""Windows of tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.data.tokens import contiguous, sample
from secateur.utils.errors import InputError


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 400), st.integers(1, 20), st.integers(2, 30), st.integers(0, 9))
def test_windows_are_disjoint_pieces_of_the_stream(tokens, samples, length, seed):
    stream = torch.arange(1, tokens + 1)
    if tokens < length:
        with pytest.raises(InputError, match="too short"):
            sample(stream, samples, length, seed)
        return
    made = sample(stream, samples, length, seed)
    again = sample(stream, samples, length, seed)
    assert torch.equal(made.ids, again.ids)
    assert made.fingerprint == again.fingerprint
    assert made.ids.shape[1] == length
    assert len(made.ids) <= samples
    real = made.ids[made.mask]
    assert len(set(real.tolist())) == len(real) == made.count  # disjoint
    assert bool((made.ids[~made.mask] == 0).all())
    for ids, mask in zip(made.ids, made.mask, strict=True):
        row = ids[mask]
        assert len(row) > 1
        assert bool((row.diff() == 1).all())  # in order, and nothing skipped
        assert bool(mask[: len(row)].all())  # padding stands behind
    if tokens // length < samples:  # all of the text is used, but for a lone last token
        assert made.count in (tokens, tokens - 1)
    else:
        assert made.count == samples * length


def test_another_seed_gives_other_windows():
    stream = torch.arange(1000)
    assert sample(stream, 5, 10, 0).fingerprint != sample(stream, 5, 10, 1).fingerprint


def test_the_last_shorter_window_is_masked():
    made = sample(torch.arange(1, 26), 8, 10, 0)
    assert made.ids.shape == (3, 10)
    assert made.mask.sum(1).tolist() == [10, 10, 5]
    assert made.ids[2].tolist() == [21, 22, 23, 24, 25, 0, 0, 0, 0, 0]


def test_contiguous_takes_whole_windows_from_the_start():
    made = contiguous(torch.arange(25), 10)
    assert made.ids.flatten().tolist() == list(range(20))
    assert bool(made.mask.all())
    assert contiguous(torch.arange(100), 10, 3).ids.shape == (3, 10)
    with pytest.raises(InputError, match="too short"):
        contiguous(torch.arange(9), 10)
