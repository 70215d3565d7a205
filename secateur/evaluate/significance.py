"""Standard errors of scores and of differences, and comparison with the chance level."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ERRORS = 2.0  # standard errors below which a distance says nothing
Figures = dict[str, Any]


@dataclass(frozen=True)
class Answers:
    """What a model answered to each item of a task.

    Attributes:
        right: points of each item, float64, by metric; the first metric is the one that is judged.
        chosen: number of the answer that was chosen, int64; of an item without choices whether it
            was right.
        chance: mean points of who answers at random, or None where there is no such answer.
    """

    right: dict[str, Tensor]
    chosen: Tensor
    chance: float | None

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Points of the main metric and choices of a task, named for a file."""
        points = next(iter(self.right.values()))
        return {f"task.{name}.right": points.double(), f"task.{name}.chosen": self.chosen}

    def figures(self) -> Figures:
        """Every metric with its standard error, the number of items, and what chance gives."""
        found: Figures = {"items": len(self.chosen), "chance": self.chance}
        for metric, points in self.right.items():
            found[metric] = float(points.double().mean())
            found[f"{metric}_stderr"] = standard_error(points)
        return found


def standard_error(values: Tensor) -> float | None:
    """Standard error of the mean: sample deviation (n − 1) over √n; None for a single value."""
    if len(values) < 2:
        return None
    return float(values.double().std(correction=1)) / math.sqrt(len(values))


def changes(name: str, dense: Mapping[str, Tensor], small: Mapping[str, Tensor]) -> Figures:
    """How a task's answers changed, from what :meth:`Answers.tensors` gave of both models.

    The items are the same, so the error is that of the mean of their differences, which is smaller
    than the two scores' own errors together. ``flipped`` is the share of items with another answer;
    ``to_wrong`` and ``to_right`` are those that lost and that won by it.
    """
    before, after = (kept[f"task.{name}.right"] for kept in (dense, small))
    moved = dense[f"task.{name}.chosen"] != small[f"task.{name}.chosen"]
    return {
        "difference": float((after - before).mean()),
        "stderr": standard_error(after - before),
        "flipped": float(moved.double().mean()),
        "to_wrong": float((after < before).double().mean()),
        "to_right": float((after > before).double().mean()),
    }


def metric_of(figures: Mapping[str, Any]) -> str:
    """The main metric of a task: the first with a standard error.

    Raises:
        KeyError: there is none.
    """
    for key in figures:
        if key.endswith("_stderr"):
            return key.removesuffix("_stderr")
    raise KeyError("…_stderr")


def at_chance(figures: Mapping[str, Any]) -> bool:
    """Whether a score is at most :data:`ERRORS` standard errors above the chance level."""
    metric, chance = metric_of(figures), figures["chance"]
    if chance is None:
        return False
    error = figures[f"{metric}_stderr"]
    return error is None or bool(figures[metric] - chance <= ERRORS * error)


def within_error(change: Mapping[str, Any]) -> bool:
    """Whether a difference is at most :data:`ERRORS` standard errors."""
    error = change["stderr"]
    return error is None or abs(change["difference"]) <= ERRORS * error


def doubts(
    scores: Mapping[str, Mapping[str, Figures]], changed: Mapping[str, Figures]
) -> list[str]:
    """Notes about scores at chance level and differences that are not significant.

    ``scores`` has, for each model, the figures of each task.
    """
    said = []
    for who, tasks in scores.items():
        blind = [name for name, figures in tasks.items() if at_chance(figures)]
        if blind:
            said.append(
                f"{who} is at chance level on {_listed(blind)}: its score is at most {ERRORS:g} "
                f"standard errors above chance, so the task says nothing about it"
            )
    same = [name for name, change in changed.items() if within_error(change)]
    if same:
        said.append(
            f"no significant difference on {_listed(same)}: it is at most {ERRORS:g} standard "
            f"errors; use more items to decide"
        )
    return said


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)


def points(values: Sequence[float]) -> Tensor:
    """Numbers as the tensor that :class:`Answers` contains."""
    return torch.tensor(values, dtype=torch.float64)
