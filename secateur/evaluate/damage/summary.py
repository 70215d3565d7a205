"""All measurements that `--damage` asks for."""

from typing import Any

from secateur.data.tasks import CausalLM
from secateur.data.tokens import Tokens
from secateur.evaluate.damage.classes import by_class
from secateur.evaluate.damage.confidence import calibration_error, confidences
from secateur.evaluate.damage.recall import recall, steps
from secateur.evaluate.damage.repetition import repetition
from secateur.models.model import Model
from secateur.utils.progress import Progress


def damage(model: Model, first: Tokens, room: int, progress: Progress) -> dict[str, Any]:
    """All measurements that apply to the model, on the first text; see docs/evaluation.md."""
    found: dict[str, Any] = {}
    with progress.stage("calibration of outputs", 1) as advance:
        found["confidence"] = calibration_error(*confidences(model, first))
        advance(1)
    if isinstance(model.use, CausalLM):
        with progress.stage("repetition", 1) as advance:
            found["repetition"] = repetition(model, first, room)
            advance(1)
        with progress.stage("planted keys", steps()) as advance:
            found["recall"] = recall(model, first.ids.flatten(), advance)
    if not model.use.reads_text:
        with progress.stage("classes", 1) as advance:
            found["classes"] = by_class(model, first)
            advance(1)
    return {name: figures for name, figures in found.items() if figures}
