"""Perplexity, and the share of right answers, over held-out text or images."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from secateur.errors import InputError
from secateur.text import Tokens
from secateur.uses import CausalLM, Use

TOKENS_PER_BATCH = 4096
LOGITS_PER_BATCH = 2**25  # 128 MB of them in float32, if a window is no longer


def perplexity(
    module: Any, tokens: Tokens, advance: Callable[[int], None] = lambda _: None
) -> float:
    """exp of the mean negative log-likelihood of every token but a window's first.

    Windows don't see each other. ``module`` is a causal language model; ``advance`` is told how
    many windows are done. Don't compare values across tokenizers or window lengths.

    Raises:
        InputError: the model's output is not finite.
    """
    return answered(module, CausalLM(), tokens, advance)[0]


def rows_at_once(module: Any, use: Use, tokens: Tokens) -> int:
    """How many rows go through the model together, so that their logits take bounded room."""
    vocabulary = module.get_input_embeddings().weight.shape[0] if use.reads_text else 1
    batch = min(TOKENS_PER_BATCH, LOGITS_PER_BATCH // vocabulary)
    return max(1, batch // tokens.length)


def answered(
    module: Any, use: Use, tokens: Tokens, advance: Callable[[int], None] = lambda _: None
) -> tuple[float, float]:
    """exp of the mean cross-entropy of all answers, and the share of them that are right.

    Raises:
        InputError: the model's output is not finite, or nothing says what it should be.
    """
    rows = rows_at_once(module, use, tokens)
    total, right, count = 0.0, 0, 0
    with torch.inference_mode():
        for start in range(0, len(tokens), rows):
            given = tokens[start : start + rows].to(module.device)
            found, wanted = use.answers(module(**use.inputs(given)).logits, given)
            losses = nn.functional.cross_entropy(found.float(), wanted, reduction="none")
            total += float(losses.double().sum())
            right += int((found.argmax(-1) == wanted).sum())
            count += len(wanted)
            advance(len(given))
    if not count:
        raise InputError(use.lacking)
    mean = total / count
    if not math.isfinite(mean):
        raise InputError("perplexity is not finite: the model's output holds NaN or infinities.")
    return math.exp(min(mean, 700.0)), right / count  # exp overflows above
