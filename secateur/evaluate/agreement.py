"""How far a compressed model's output is from that of the dense one, on the same text."""

from typing import Any

import torch
from torch import Tensor

from secateur.model import Model
from secateur.text import Tokens

ROWS_PER_BATCH = 8
ROWS = 1024  # outputs compared at a time
MOST_NUMBERS = 2**24  # of the dense model's output that are kept: 64 MB


def outputs(model: Model, tokens: Tokens) -> Tensor:
    """Log-probabilities (outputs, classes) of the first outputs that count, float32 on the CPU.

    As many as :data:`MOST_NUMBERS` hold.
    """
    module: Any = model.module
    found: list[Tensor] = []
    numbers = 0
    with torch.inference_mode():
        for start in range(0, len(tokens), ROWS_PER_BATCH):
            given = tokens[start : start + ROWS_PER_BATCH].to(model.device)
            logits = module(**model.use.inputs(given)).logits
            found.append(logits[model.use.counted(given)].float().log_softmax(-1).cpu())
            numbers += found[-1].numel()
            if numbers >= MOST_NUMBERS:
                break
    together = torch.cat(found)
    return together[: max(1, MOST_NUMBERS // together.shape[1])]


def agreement(dense: Tensor, small: Tensor) -> dict[str, float]:
    """Mean divergence KL(dense ‖ small) in nats, and the share of outputs with the same first."""
    divergence = 0.0
    for ours, theirs in zip(small.split(ROWS), dense.split(ROWS), strict=True):
        terms = theirs.double().exp() * (theirs.double() - ours.double())
        divergence += float(terms.sum())
    same = dense.argmax(-1) == small.argmax(-1)
    return {"kl": max(0.0, divergence / len(dense)), "top1": float(same.double().mean())}
