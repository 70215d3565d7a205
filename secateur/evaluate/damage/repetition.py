"""Repeated n-grams in greedy continuations."""

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.data.tokens import Tokens
from secateur.evaluate.agreement import spread
from secateur.models.model import Model

PROMPTS, PROMPT_TOKENS, NEW_TOKENS, GRAM = 16, 32, 96, 4


def repeated(rows: Sequence[Sequence[int]], gram: int = GRAM) -> float:
    """Share of n-grams that occurred earlier in the same row; 0 if rows are too short."""
    every, new = 0, 0
    for row in rows:
        grams = list(zip(*(row[i:] for i in range(gram)), strict=False))
        every += len(grams)
        new += len(set(grams))
    return 1 - new / every if every else 0.0


def repetition(model: Model, tokens: Tokens, room: int) -> dict[str, float]:
    """Repetition in continuations of held-out beginnings, and in the true continuations.

    A row ends at the first end token. The prompts are spread evenly over the text.
    """
    whole = tokens.whole
    prompt = min(PROMPT_TOKENS, room // 2, whole.length // 2)
    count = min(NEW_TOKENS, room - prompt)
    chosen = whole[spread(len(whole), PROMPTS)].ids
    new = model.use.generated(model.module, chosen[:, :prompt].to(model.device), count)
    ends = _ends(model)
    return {
        "repeated": repeated([until(row, ends) for row in new.tolist()]),
        "text": repeated(_rows(chosen[:, prompt : prompt + count])),
        "prompts": len(chosen),
        "tokens": count,
    }


def _rows(ids: Tensor) -> list[list[int]]:
    return [list(map(int, row)) for row in ids]


def until(row: Sequence[int], ends: Sequence[int]) -> list[int]:
    """The row up to its first end token."""
    place = next((i for i, token in enumerate(row) if token in ends), len(row))
    return list(row[:place])


def _ends(model: Model) -> list[int]:
    said = model.module.generation_config.eos_token_id
    return torch.tensor([] if said is None else said).flatten().int().tolist()
