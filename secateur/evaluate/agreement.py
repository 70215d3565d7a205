"""Top-1 agreement and KL divergence of a compressed model with the dense one, on the same text."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.calibration.forward_batches import batches
from secateur.data.tokens import Tokens
from secateur.evaluate.significance import Figures, changes
from secateur.io.run_directory import whole
from secateur.models.model import Model
from secateur.utils.errors import InputError

OUTPUTS = 8192  # outputs that are compared, at most
MOST_NUMBERS = 2**26  # log-probabilities of the dense model that are kept: 256 MB
AT_ONCE = 2**22  # numbers that are compared at a time, in float64


def outputs(model: Model, tokens: Tokens) -> Tensor:
    """Log-probabilities (outputs, classes) of a sample of outputs, float32 on the CPU.

    The rows are spread evenly over the text, and are enough for :data:`OUTPUTS` outputs. If these
    would take more than :data:`MOST_NUMBERS` numbers, only every n-th output is used.
    """
    chosen = some_rows(model, tokens)
    seen, step = 0, 1
    found: list[Tensor] = []
    for given, logits in batches(model, chosen):
        if not found:
            wanted = int(model.use.counted(chosen).sum()) * logits.shape[-1]
            step = math.ceil(wanted / MOST_NUMBERS)
        counted = logits[model.use.counted(given)]
        found.append(counted[-seen % step :: step].float().log_softmax(-1).cpu())
        seen += len(counted)
    return torch.cat(found)


def some_rows(model: Model, tokens: Tokens) -> Tokens:
    """Rows spread evenly over the text, enough for :data:`OUTPUTS` outputs."""
    every = int(model.use.counted(tokens).sum())
    return tokens[spread(len(tokens), math.ceil(len(tokens) * min(1.0, OUTPUTS / every)))]


def spread(length: int, number: int) -> list[int]:
    """At most ``number`` indices below ``length``, evenly spaced from 0."""
    number = min(number, length)
    return [i * length // number for i in range(number)]


def agreement(dense: Tensor, small: Tensor) -> dict[str, float]:
    """Mean KL(dense ‖ small) in nats, and top-1 agreement: how often both argmaxes are equal.

    Both arguments are log-probabilities (outputs, classes). The result also has their number.

    Raises:
        InputError: the divergence is not finite.
    """
    divergence, rows = 0.0, max(1, AT_ONCE // dense.shape[1])
    for ours, theirs in zip(small.split(rows), dense.split(rows), strict=True):
        chances = theirs.double().exp()
        terms = chances * (theirs.double() - ours.double())
        divergence += float(terms[chances != 0].sum())
    if not math.isfinite(divergence):
        raise InputError("the models' divergence is not finite: an output holds NaN or infinities.")
    same = dense.argmax(-1) == small.argmax(-1)
    return {
        "kl": max(0.0, divergence / len(dense)),
        "top1": float(same.double().mean()),
        "outputs": len(dense),
    }


def compared(
    kept: dict[str, Tensor], tasks: Sequence[str], outputs_of_dense: Path | None
) -> tuple[dict[str, float], dict[str, Figures]]:
    """Hold the outputs ``kept`` of a model against those of the dense one in a file.

    The values are what :func:`agreement` says, and for each of ``tasks`` what
    :func:`~secateur.evaluate.significance.changes` says. Where there is no such file yet, the
    model is the dense one, and its outputs are written there.

    Raises:
        InputError: the two models do not read the text alike.
    """
    if outputs_of_dense is None:
        return {}, {}
    if not outputs_of_dense.exists():
        with whole(outputs_of_dense) as partial:
            save_file(kept, partial)
        return {}, {}
    dense, agrees = load_file(outputs_of_dense), {}
    if "outputs" in kept:
        _check_alike(dense, kept)
        agrees = agreement(dense["outputs"], kept["outputs"])
    return agrees, {name: changes(name, dense, kept) for name in tasks}


def _check_alike(dense: dict[str, Tensor], small: dict[str, Tensor]) -> None:
    """Refuse to compare two models that tokenize text differently.

    Raises:
        InputError: their tokens differ, or the number of their outputs.
    """
    both = (dense["outputs"], small["outputs"])
    same = [torch.equal(dense[key], small[key]) for key in ("text",) if key in dense]
    if both[0].shape != both[1].shape or not all(same):
        raise InputError(
            f"the two models do not read the text alike ({both[0].shape[1]} classes an output and "
            f"{both[1].shape[1]}, or other tokens); a model can be held against the one that it "
            f"was made from."
        )
