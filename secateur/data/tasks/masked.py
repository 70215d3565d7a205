"""Masked language models, which predict masked tokens from both sides."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from secateur.data.tasks.base import Use
from secateur.data.tokens import (
    UNLABELLED,
    Calibration,
    Text,
    Tokens,
    calibration_tokens,
    held_windows,
)
from secateur.utils.errors import InputError

MASKED = 0.15  #: share of the tokens that are hidden, as BERT was trained (arXiv 1810.04805, 3.1)
SPECIALS = 2  #: tokens that stand around every window


@dataclass(frozen=True)
class MaskedLM(Use):
    """Windows of text between the tokenizer's special tokens, with some tokens masked.

    They are evaluated by the perplexity of the masked tokens and the share that is predicted
    correctly. Windows are never padded, so no attention mask is needed.
    """

    auto: ClassVar[str] = "AutoModelForMaskedLM"
    what: ClassVar[str] = "masked language model"
    counts: ClassVar[str] = "hidden tokens"
    share: ClassVar[str | None] = "hidden tokens found"

    def calibration(self, calibration: Calibration, reader: Any) -> Tokens:
        """Windows of the text that is not held out, masked with the calibration's seed."""
        inside = replace(calibration, length=_inside(calibration.length))
        found = calibration_tokens(inside, reader)
        return self._hidden(found.whole, reader, calibration.seed)

    def held(self, text: Text, reader: Any, length: int, limit: int) -> Tokens:
        """Consecutive windows, masked in the same way for every model with this tokenizer."""
        return self._hidden(held_windows(text, reader, _inside(length), limit), reader, 0)

    def inputs(self, tokens: Tokens) -> dict[str, Any]:
        """Token ids; there is no padding."""
        return {"input_ids": tokens.ids}

    def _hidden(self, windows: Tokens, reader: Any, seed: int) -> Tokens:
        """The masked windows, and the masked tokens as labels."""
        if None in (reader.mask_token_id, reader.cls_token_id, reader.sep_token_id):
            raise InputError(
                "the tokenizer has no mask, start or end token ([MASK], [CLS], [SEP]), without "
                "which a masked language model cannot be asked anything; fetch it again."
            )
        ids = windows.ids
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.rand(ids.shape, generator=generator) < MASKED
        one = torch.randint(ids.shape[1], (len(ids), 1), generator=generator)
        one = torch.arange(ids.shape[1]) == one
        hidden |= one & ~hidden.any(1, keepdim=True)  # of every window at least one
        labels = torch.where(hidden, ids, UNLABELLED)
        ids = torch.where(hidden, reader.mask_token_id, ids)
        ids = _between(ids, reader.cls_token_id, reader.sep_token_id)
        labels = _between(labels, UNLABELLED, UNLABELLED)
        return Tokens(ids, torch.ones_like(ids, dtype=torch.bool), labels)


def _inside(length: int) -> int:
    """Number of text tokens in a window.

    Raises:
        InputError: there is room for none.
    """
    if length <= SPECIALS:
        raise InputError(
            f"a window of {length} tokens has no room between its start and its end token; give at "
            f"least {SPECIALS + 1} (--length, --eval-length)."
        )
    return length - SPECIALS


def _between(ids: torch.Tensor, first: int, last: int) -> torch.Tensor:
    return nn.functional.pad(nn.functional.pad(ids, (1, 0), value=first), (0, 1), value=last)
