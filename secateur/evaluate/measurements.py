"""What to measure of a model, and what was measured."""

from dataclasses import dataclass, field
from typing import Any

from secateur.data.tokens import Text
from secateur.evaluate.significance import Figures


@dataclass(frozen=True)
class Questions:
    """What to evaluate, equally for all models of a run.

    Attributes:
        texts: what to judge on.
        length: tokens in a window; by default 256, or all positions of a shorter model.
        windows: at most this many windows of each text, from its start.
        prompt: text that the model continues; by default the beginning of the first text.
        new_tokens: length of the continuation; by default 40, or what fits.
        speed: whether to time it.
        tasks: task files, and names of tasks of lm-evaluation-harness.
        task_limit: at most this many items of each task, from its start.
        damage: whether to measure what perplexity does not show.
    """

    texts: tuple[Text, ...]
    length: int | None = None
    windows: int = 256
    prompt: str | None = None
    new_tokens: int | None = None
    speed: bool = True
    tasks: tuple[str, ...] = ()
    task_limit: int | None = None
    damage: bool = False


@dataclass
class Measurements:
    """The figures of one model. ``peak_memory_bytes`` counts from before the weights were loaded.

    ``tokens`` is the number of outputs of each figure, and ``counts`` their kind: tokens or images.
    ``texts`` has the fingerprint of each text's tokens. ``tasks`` contains accuracies.
    ``agreement`` (compressed models only) is the result of
    :func:`~secateur.evaluate.agreement.agreement` on the first text. ``task_scores`` has the
    figures of each requested task, and ``task_changes`` (compressed models only) the result of
    :func:`~secateur.evaluate.significance.changes` for each. ``damage`` is the result of
    :func:`~secateur.evaluate.damage.summary.damage`, if requested.
    """

    parameters: int
    bytes: int
    perplexity: dict[str, float]
    tokens: dict[str, int]
    prompt: str
    sample: str
    peak_memory_bytes: int
    speed: dict[str, float] = field(default_factory=dict)
    counts: str = "tokens"
    tasks: dict[str, float] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)
    task_scores: dict[str, Figures] = field(default_factory=dict)
    task_changes: dict[str, Figures] = field(default_factory=dict)
    damage: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
