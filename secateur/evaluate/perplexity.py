"""Perplexity and accuracy on held-out text or images."""

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from secateur.calibration.forward_batches import Batches, batches, whole_batches
from secateur.data.tasks import CausalLM, Use
from secateur.data.tokens import Tokens
from secateur.models.model import Model
from secateur.utils.errors import InputError
from secateur.utils.precision import exact


def perplexity(
    module: Any, tokens: Tokens, advance: Callable[[int], None] = lambda _: None
) -> float:
    """exp of the mean negative log-likelihood of every token but a window's first.

    Windows don't see each other. ``module`` is a causal language model; ``advance`` is told how
    many windows are done. Don't compare values across tokenizers or window lengths.

    Raises:
        InputError: the model's output is not finite.
    """
    use = CausalLM()
    return _summed(use, whole_batches(module, use, tokens, advance))[0]


def answered(
    model: Model, tokens: Tokens, advance: Callable[[int], None] = lambda _: None
) -> tuple[float, float]:
    """exp of the mean cross-entropy of all labels, and the accuracy.

    Raises:
        InputError: the model's output is not finite, or nothing says what it should be.
    """
    return _summed(model.use, batches(model, tokens, advance))


def _summed(use: Use, said: Batches) -> tuple[float, float]:
    total, right, count = 0.0, 0, 0
    for given, logits in said:
        found, wanted = use.answers(logits, given)
        losses = nn.functional.cross_entropy(found.float(), wanted, reduction="none")
        total += float(exact(losses).sum())
        right += int((found.argmax(-1) == wanted).sum())
        count += len(wanted)
    if not count:
        raise InputError(use.lacking)
    mean = total / count
    if not math.isfinite(mean):
        raise InputError("perplexity is not finite: the model's output holds NaN or infinities.")
    return math.exp(min(mean, 700.0)), right / count  # exp overflows above
