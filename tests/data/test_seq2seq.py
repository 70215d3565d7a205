"""Spans of text that are hidden, and the rows that they make."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from secateur import InputError
from secateur.data.tasks import Seq2SeqLM
from secateur.data.tasks.seq2seq import corrupted, lengths
from secateur.data.tokens import Calibration, Text

# Spans that are hidden


class Reader:
    """Sixty words, sentinels, and an end token."""

    eos_token_id = 1

    def __init__(self, sentinels=20):
        names = ["<pad>", "</s>", *(f"w{i}" for i in range(60))]
        names += [f"<extra_id_{i}>" for i in range(sentinels)]
        self.vocabulary = {name: number for number, name in enumerate(names)}

    def get_vocab(self):
        return self.vocabulary

    def __call__(self, text, **_):
        return {"input_ids": [self.vocabulary[word] for word in text.split()]}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text(" ".join(f"w{i * i % 60}" for i in range(3000)))
    return str(path)


def undone(ids, labels, first):
    """The window that was hidden, from both sides: every sentinel by what stands behind it."""
    spans, target = {}, labels.tolist()
    for token in target[:-1]:
        if token >= first:
            spans[token] = []
            last = token
        else:
            spans[last].append(token)
    assert target[-1] == 1
    assert spans.pop(last) == []  # the last sentinel stands for the end
    assert list(spans) == [first + i for i in range(len(spans))]
    window = []
    for token in ids.tolist()[:-1]:
        window += spans.pop(token) if token >= first else [token]
    assert not spans
    assert ids[-1] == 1
    return window


def test_rows_are_windows_with_spans_behind_sentinels(text):
    """Fifteen in a hundred tokens, three a span; every row of one length."""
    reader, use = Reader(), Seq2SeqLM(start=0)
    tokens = use.calibration(Calibration(text, 12, 64, 3), reader)
    hidden, spans, first = 10, 3, reader.vocabulary["<extra_id_0>"]
    assert tokens.ids.shape == (12, 64 - hidden + spans + 1)
    assert tokens.labels.shape == (12, hidden + spans + 2)
    assert tokens.mask.shape == (12, tokens.ids.shape[1] + tokens.labels.shape[1])
    assert bool(tokens.mask.all())
    stream = reader(Path(text).read_text())["input_ids"]
    windows = [stream[i : i + 64] for i in range(0, len(stream), 64)]
    found = [undone(*pair, first) for pair in zip(tokens.ids, tokens.labels, strict=True)]
    assert all(window in windows for window in found)
    for row in tokens.ids:
        places = (row >= first).nonzero().flatten().tolist()
        assert places[0] > 0  # something stands before, between and behind the spans
        assert all(b - a > 1 for a, b in pairwise([*places, len(row) - 1]))
    assert len({tuple((row >= first).tolist()) for row in tokens.ids}) > 6


def test_the_seed_says_what_is_hidden(text):
    reader, use = Reader(), Seq2SeqLM(start=0)
    one, again, other = (
        use.calibration(Calibration(text, 8, 32, seed, windows=(3, 1, 4)), reader)
        for seed in (0, 0, 1)
    )
    assert one.fingerprint == again.fingerprint != other.fingerprint
    held = [use.held(Text("t", text, 0.8), reader, 32, 4) for _ in range(2)]
    assert held[0].fingerprint == held[1].fingerprint
    assert len(held[0]) == 4


def test_lengths_are_positive_and_add_up():
    generator = torch.Generator().manual_seed(0)
    seen = {tuple(lengths(5, 3, generator)) for _ in range(200)}
    assert seen == {(a, b, 5 - a - b) for a in range(1, 4) for b in range(1, 5 - a)}
    assert lengths(4, 1, generator) == [4]


def test_a_row_by_hand():
    read, target = corrupted([*range(10, 20)], [1, 2], [2, 3, 2], [90, 91, 92])
    assert read == [10, 11, 90, 13, 14, 15, 91, 18, 19]
    assert target == [90, 12, 91, 16, 17, 92]


@pytest.mark.parametrize("reader", [Reader(sentinels=3), Reader(sentinels=0)])
def test_a_tokenizer_without_sentinels_is_refused(text, reader):
    with pytest.raises(InputError, match="<extra_id_"):
        Seq2SeqLM(start=0).calibration(Calibration(text, 8, 64, 0), reader)


def test_windows_too_short_to_hide_anything_are_refused(text):
    with pytest.raises(InputError, match="too short"):
        Seq2SeqLM(start=0).held(Text("t", text), Reader(), 2, 4)
