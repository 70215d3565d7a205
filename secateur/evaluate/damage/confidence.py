"""Expected calibration error of the top-1 prediction."""

import torch
from torch import Tensor

from secateur.calibration.forward_batches import batches
from secateur.data.tokens import Tokens
from secateur.evaluate.agreement import some_rows
from secateur.models.model import Model

BINS = 15


def confidences(model: Model, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Probability of the top-1 prediction for outputs with a label, and whether it is correct.

    The rows are spread evenly over the text; the result is on the CPU.
    """
    sure, right = [], []
    for given, logits in batches(model, some_rows(model, tokens)):
        found, wanted = model.use.answers(logits, given)
        best, place = found.float().max(-1)
        sure.append((best - found.float().logsumexp(-1)).exp().cpu())
        right.append((place == wanted).cpu())
    return torch.cat(sure), torch.cat(right)


def calibration_error(sure: Tensor, right: Tensor, bins: int = BINS) -> dict[str, float]:
    """Σ_b n_b/n · |accuracy in b − mean probability in b|, over bins of equal counts.

    Bins of equal width would contain almost all tokens of a weak model in one. ``gap`` is the mean
    probability minus the accuracy; it is positive if the model is overconfident.
    """
    order = sure.argsort(stable=True)
    sure, right = sure.double()[order], right.double()[order]
    parts = zip(sure.tensor_split(bins), right.tensor_split(bins), strict=True)
    error = sum(float((hit.sum() - said.sum()).abs()) for said, hit in parts)
    return {
        "error": error / len(sure),
        "gap": float(sure.mean() - right.mean()),
        "outputs": len(sure),
    }
