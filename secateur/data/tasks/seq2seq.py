"""Text-to-text models, whose decoder generates what is masked in the encoder's text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secateur.data.tasks.base import Use
from secateur.data.tokens import Calibration, Text, Tokens, calibration_tokens, held_windows
from secateur.utils.errors import InputError

HIDDEN = 0.15  #: share of the tokens that are hidden, as T5 was trained (arXiv 1910.10683, 3.1.4)
SPAN = 3  #: mean length of a hidden span there


@dataclass(frozen=True)
class Seq2SeqLM(Use):
    """Whole windows of text, in which spans are hidden and are to be written.

    Each span is one sentinel in what the encoder reads; the target is every sentinel with its span
    behind it, one more sentinel, and the end token. All windows have as many spans and as many
    hidden tokens, so none is padded and no mask is needed. Judged by the perplexity of the targets
    and by how many of their tokens are found.

    Attributes:
        start: token before the first of a target.
    """

    start: int

    auto: ClassVar[str] = "AutoModelForSeq2SeqLM"
    what: ClassVar[str] = "text-to-text model"
    writes: ClassVar[bool] = True
    counts: ClassVar[str] = "target tokens"
    share: ClassVar[str | None] = "target tokens found"

    def calibration(self, calibration: Calibration, reader: Any) -> Tokens:
        """Windows of the text that is not held out, masked with the calibration's seed."""
        self._sentinels(reader, calibration.length)  # before a long text is read
        found = calibration_tokens(calibration, reader)
        return self._hidden(found.whole, reader, calibration.seed)

    def held(self, text: Text, reader: Any, length: int, limit: int) -> Tokens:
        """Consecutive windows, masked in the same way for every model with this tokenizer."""
        return self._hidden(held_windows(text, reader, length, limit), reader, 0)

    def example(self, rows: int, length: int) -> Tokens:
        """One token repeated, in the shape that :meth:`calibration` makes of a window."""
        hidden, spans = _counts(length)
        ids = torch.zeros(rows, length - hidden + spans + 1, dtype=torch.int64)
        return _side_by_side(ids, ids.new_zeros(rows, hidden + spans + 2))

    def inputs(self, tokens: Tokens) -> dict[str, Any]:
        """Token ids, and the targets after the start token, without a cache."""
        assert tokens.labels is not None
        before = nn.functional.pad(tokens.labels[:, :-1], (1, 0), value=self.start)
        return {"input_ids": tokens.ids, "decoder_input_ids": before, "use_cache": False}

    def seen(self, tokens: Tokens) -> int:
        """Number of tokens on the shorter side."""
        assert tokens.labels is not None
        return min(tokens.ids.numel(), tokens.labels.numel())

    def beginning(self, tokens: Tokens, count: int) -> Tokens:
        """One short row, with at most ``count`` tokens on each side."""
        first = tokens[:1]
        assert first.labels is not None
        return _side_by_side(first.ids[:, :count].clone(), first.labels[:, :count].clone())

    def generated(self, module: Any, ids: Tensor, count: int, **options: Any) -> Tensor:
        """Generate with a cache that grows, because the stock cache has as many blocks as the
        encoder.
        """
        from transformers import DynamicCache, EncoderDecoderCache

        if options.get("use_cache", True):
            options["past_key_values"] = EncoderDecoderCache(DynamicCache(), DynamicCache())
        return super().generated(module, ids, count, **options)

    def going_on(self, last: Tensor, state: Any) -> dict[str, Any]:
        """Continue the decoder with the encoder's output."""
        own = super().going_on(last, state)
        encoded = (state.encoder_last_hidden_state,)
        return {**own, "input_ids": None, "decoder_input_ids": last, "encoder_outputs": encoded}

    def _sentinels(self, reader: Any, length: int) -> list[int]:
        """Sentinel tokens for the spans of a window, and one more for the end.

        Raises:
            InputError: the tokenizer has too few, or no end token.
        """
        wanted, known = _counts(length)[1] + 1, reader.get_vocab()
        names = [f"<extra_id_{i}>" for i in range(wanted)]
        missing = [name for name in names if name not in known]
        if missing or reader.eos_token_id is None:
            raise InputError(
                f"the tokenizer has no {missing[0] if missing else 'end token'}: without an end "
                f"token and {wanted} sentinels from <extra_id_0> on nothing can be hidden in "
                f"windows of {length} tokens. Take the tokenizer that the model was trained with, "
                f"or shorter windows (--length, --eval-length)."
            )
        return [known[name] for name in names]

    def _hidden(self, windows: Tokens, reader: Any, seed: int) -> Tokens:
        """The encoder's input for the windows, and the targets as labels."""
        length = windows.ids.shape[1]
        sentinels, (hidden, spans) = self._sentinels(reader, length), _counts(length)
        generator = torch.Generator().manual_seed(seed)
        given, wanted = [], []
        for row in windows.ids.tolist():
            own = lengths(hidden, spans, generator)
            between = lengths(length - hidden, spans + 1, generator)
            read, target = corrupted(row, own, between, sentinels)
            given.append([*read, reader.eos_token_id])
            wanted.append([*target, reader.eos_token_id])
        return _side_by_side(torch.tensor(given), torch.tensor(wanted))


def lengths(total: int, parts: int, generator: torch.Generator) -> list[int]:
    """Random positive lengths with a given sum, uniform over all such lists."""
    cuts = torch.randperm(total - 1, generator=generator)[: parts - 1].sort().values + 1
    return torch.diff(cuts, prepend=cuts.new_zeros(1), append=cuts.new_tensor([total])).tolist()


def corrupted(
    row: Sequence[int], own: Sequence[int], between: Sequence[int], sentinels: Sequence[int]
) -> tuple[list[int], list[int]]:
    """A row without the spans of lengths ``own``, and the target that contains them.

    ``between`` are the lengths of the text before, between and after the spans.
    """
    read, target, place = [], [], 0
    for kept, gone, sentinel in zip(between[:-1], own, sentinels, strict=False):
        read += [*row[place : place + kept], sentinel]
        target += [sentinel, *row[place + kept : place + kept + gone]]
        place += kept + gone
    return [*read, *row[place:]], [*target, sentinels[len(own)]]


def _counts(length: int) -> tuple[int, int]:
    """Number of masked tokens per window, and of spans.

    Raises:
        InputError: the window has no room for a span and a token on each side.
    """
    hidden = max(1, round(HIDDEN * length))
    spans = max(1, round(hidden / SPAN))
    if length - hidden < spans + 1:
        raise InputError(f"windows of {length} tokens are too short to hide any; give at least 3.")
    return hidden, spans


def _side_by_side(ids: Tensor, labels: Tensor) -> Tokens:
    real = torch.ones(len(ids), ids.shape[1] + labels.shape[1], dtype=torch.bool)
    return Tokens(ids, real, labels)
