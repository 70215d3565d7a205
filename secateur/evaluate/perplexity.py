"""Perplexity over contiguous windows of a text."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from secateur.errors import InputError
from secateur.text import Tokens

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
    vocabulary, device = module.get_input_embeddings().weight.shape[0], module.device
    batch = min(TOKENS_PER_BATCH, LOGITS_PER_BATCH // vocabulary)
    rows = max(1, batch // tokens.ids.shape[1])
    total, count = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(tokens.ids), rows):
            ids = tokens.ids[start : start + rows].to(device)
            logits = module(input_ids=ids, use_cache=False).logits[:, :-1].float()
            losses = nn.functional.cross_entropy(
                logits.transpose(1, 2), ids[:, 1:], reduction="none"
            )
            real = tokens.mask[start : start + rows, 1:].to(device)
            total += float(losses[real].double().sum())
            count += int(real.sum())
            advance(len(ids))
    mean = total / count
    if not math.isfinite(mean):
        raise InputError("perplexity is not finite: the model's output holds NaN or infinities.")
    return math.exp(min(mean, 700.0))  # exp overflows above
