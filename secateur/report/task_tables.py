"""Tables of task scores, and rows of the measurements that `--damage` asks for."""

from collections.abc import Mapping
from typing import Any

from secateur.evaluate.significance import ERRORS, Figures, metric_of


def task_table(scores: Mapping[str, Figures]) -> Any:
    """Table of one model: each metric of each task, its standard error, and the chance level."""
    from rich.markup import escape

    table = _table(*("task", "items", "metric", "score", "± error", "chance"))
    for name, figures in scores.items():
        metrics = [k.removesuffix("_stderr") for k in figures if k.endswith("_stderr")]
        for metric in metrics:
            first = metric == metrics[0]
            row = (
                name if first else "",
                f"{figures['items']:,}" if first else "",
                metric,
                _share(figures[metric]),
                _share(figures[f"{metric}_stderr"]),
                _share(figures["chance"]) if first else "",
            )
            table.add_row(*map(escape, row))
    return table


def task_rows(dense: Mapping[str, Any], small: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows of two models: main metric of each task, paired difference and flipped answers.

    The first row is the header.
    """
    rows: list[tuple[str, ...]] = [
        ("task", "dense", "compressed", "difference", "flipped", "chance")
    ]
    for name, before in dense["task_scores"].items():
        after, change = small["task_scores"][name], small["task_changes"][name]
        metric = metric_of(before)
        points = f"{100 * change['difference']:+.1f}"
        if change["stderr"] is not None:
            points += f" ± {100 * change['stderr']:.1f}"
        rows.append(
            (
                f"{name}, {metric}",
                *(_measured(figures, metric) for figures in (before, after)),
                f"{points} points",
                _share(change["flipped"]),
                _share(before["chance"]),
            )
        )
    return rows


def task_comparison(dense: Mapping[str, Any], small: Mapping[str, Any]) -> Any:
    """:func:`task_rows` for a terminal."""
    from rich.markup import escape

    heads, *rows = task_rows(dense, small)
    table = _table(*heads)
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def damage_lines(
    damage: Mapping[str, Any], dense: Mapping[str, Any] | None = None
) -> dict[str, tuple[float, str]]:
    """Label → figure and unit.

    Recall is shown only if ``dense`` (by default the same model) recalls planted keys at all.
    """
    found: dict[str, tuple[float, str]] = {}
    if "confidence" in damage:
        found["expected calibration error"] = damage["confidence"]["error"], "points"
    if "repetition" in damage:
        found["repeated 4-grams in generated text"] = damage["repetition"]["repeated"], "points"
    if "recall" in damage:
        decides = (damage if dense is None else dense)["recall"]
        if decides["stderr"] and decides["nats"] > ERRORS * decides["stderr"]:
            found["recall of planted keys, nats gained"] = damage["recall"]["nats"], "nats"
    if "classes" in damage:
        found["accuracy of the worst class"] = damage["classes"]["least"], "points"
    return found


def in_unit(value: float, unit: str, sign: str = "") -> str:
    """A figure of :func:`damage_lines`; with a sign, a difference of two."""
    if unit == "nats":
        return f"{value:{sign}.2f}"
    return f"{100 * value:{sign}.1f} points" if sign else f"{value:.1%}"


def _table(*columns: str) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        left = column in ("task", "metric")
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    return table


def _measured(figures: Figures, metric: str) -> str:
    error = figures[f"{metric}_stderr"]
    return _share(figures[metric]) + ("" if error is None else f" ± {100 * error:.1f}")


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
