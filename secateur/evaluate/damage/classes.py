"""Accuracy and spectra of an image classifier, class by class."""

from typing import Any

import torch
from torch import Tensor, nn

from secateur.calibration.forward_batches import batches
from secateur.data.tokens import UNLABELLED, Tokens
from secateur.models.model import Model

FEWEST = 8  # images of a class that its spectrum is taken of


def by_class(model: Model, tokens: Tokens) -> dict[str, Any]:
    """Accuracy of each class, its spread, and the imbalance of the classes' spectra.

    ``imbalance`` is the smallest participation ratio of a class divided by the largest, 1 if all
    classes spread over equally many directions. It is absent if fewer than two classes have
    :data:`FEWEST` images.
    """
    module: Any = model.module
    head = getattr(module, "classifier", None)
    features: list[Tensor] = []
    labels = tokens.labels
    assert labels is not None
    keep = head.register_forward_pre_hook(
        lambda _, given: features.append(given[0].detach().cpu().double())
    ) if isinstance(head, nn.Linear) else None  # fmt: skip
    try:
        first = [logits.argmax(-1).cpu() for _, logits in batches(model, tokens)]
    finally:
        if keep is not None:
            keep.remove()
    known = labels != UNLABELLED
    right = (torch.cat(first) == labels)[known]
    found = accuracies(right, labels[known], model.config.id2label)
    if features:
        found |= imbalance(torch.cat(features)[known], labels[known])
    return found


def accuracies(right: Tensor, labels: Tensor, names: dict[int, str]) -> dict[str, Any]:
    """Accuracy of each class, the smallest, and the largest minus the smallest."""
    each = {int(c): float(right[labels == c].double().mean()) for c in labels.unique()}
    least = min(each.values())
    return {
        "accuracy": {names.get(c, str(c)): value for c, value in each.items()},
        "least": least,
        "spread": max(each.values()) - least,
    }


def imbalance(features: Tensor, labels: Tensor) -> dict[str, float]:
    """Smallest participation ratio of a class divided by the largest, for equally many images.

    The number of images is equal because the ratio of n images is at most n − 1.
    """
    numbers = {int(c): int((labels == c).sum()) for c in labels.unique()}
    taken = [c for c, number in numbers.items() if number >= FEWEST]
    if len(taken) < 2:
        return {}
    same = min(numbers[c] for c in taken)
    ratios = [participation(features[labels == c][:same]) for c in taken]
    return {"imbalance": min(ratios) / max(ratios)} if max(ratios) else {}


def participation(rows: Tensor) -> float:
    """(Σλ)² / Σλ² of the covariance's eigenvalues: over how many directions the rows spread."""
    centred = rows - rows.mean(0)
    gram = centred @ centred.T  # its eigenvalues are those of the covariance, times a number
    return float(gram.trace() ** 2 / square) if (square := float((gram**2).sum())) else 0.0
