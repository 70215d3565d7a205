"""Pictures of one step: sizes and errors of its units, and properties of the layers."""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from secateur.report.html import charts
from secateur.report.html.charts import percent
from secateur.report.report import size
from secateur.report.run_records import UnitRow
from secateur.structure.units import KINDS

ATTENTION, MLP = "attention", "mlp"


def title_of(group: str) -> str:
    """The heading of a group of units: of those of one kind, or of what reports call it."""
    return KINDS[group].title if group in KINDS else group


class Figure(NamedTuple):
    """A picture with its heading and an optional note on how to read it."""

    name: str
    picture: Markup
    note: str = ""


class UnitPosition(NamedTuple):
    """The layer of a unit, and its group within the layer."""

    layer: str
    group: str


def place(unit: str) -> UnitPosition:
    """The position of a unit such as ``layers.3.mlp`` or ``encoder.layers.3.mlp``."""
    found = re.fullmatch(r"(.*?)\.?(?:layers|h|block|layer)\.(\d+)\.(.+)", unit)
    if found is None:
        return UnitPosition("", unit)
    before, layer, group = found.groups()
    return UnitPosition(layer, f"{before} {group}".strip())


def step_figures(name: str, rows: Sequence[UnitRow], seen: dict[str, Any]) -> dict[str, Any]:
    """All pictures of one step, and the table of its units."""
    groups: dict[str, list[tuple[str, UnitRow]]] = {}
    for row in rows:
        layer, group = place(row.unit)
        groups.setdefault(group, []).append((layer, row))
    changing = {g: own for g, own in groups.items() if any(r.kept != 1 for _, r in own)}
    errors = seen.get("errors") or []
    return {
        "name": name,
        "sizes": [
            Figure(title_of(group), kept_figure(group, own))
            for group, own in changing.items()
            if len(own) > 1
        ],
        "still": [title_of(g) for g in groups if g not in changing],
        "errors": [*error_figures(rows, errors)],
        "predicted": any(row.predicted_error and row.kind != "block" for row in rows),
        "losses": [*loss_figures(changing)],
        "predicted_loss": total_loss(rows),
        "influence": layer_figure("Block influence", "1 − cosine", seen.get("influence") or []),
        "directions": direction_figure(seen.get("directions") or []),
        "curves": [*curve_figures(groups, seen.get("curves") or {})],
        "units": [
            (
                row.unit,
                row.said,
                f"{row.kept:.0%}",
                size(row.bytes),
                percent(row.predicted_error),
                loss_of(row),
            )
            for row in rows
        ],
        "lossy": any(row.predicted_loss is not None for row in rows),
    }


def loss_of(row: UnitRow) -> str:
    """The predicted loss of a unit; empty where it was not measured."""
    return "" if row.predicted_loss is None else f"{row.predicted_loss:.2g}"


def kept_figure(group: str, own: Sequence[tuple[str, UnitRow]]) -> Markup:
    """Chart of the shares kept, by layer."""
    told = [f"{row.unit}: {row.said} ({row.kept:.0%})" for _, row in own]
    title = f"{title_of(group)} kept, by layer"
    return charts.kept(title, [layer for layer, _ in own], [row.kept for _, row in own], told)


def part_of(row: UnitRow) -> str:
    """Whether a unit belongs to the attention or to the MLP of its block."""
    inside = row.unit.lower()
    known = ("attention", "attn", "query", "value", "heads", "q_proj", "k_proj", "v_proj", "o_proj")
    return ATTENTION if any(word in inside for word in known) else MLP


def error_figures(
    rows: Sequence[UnitRow], errors: Sequence[dict[str, float | None]]
) -> Iterator[Figure]:
    """Predicted and measured output errors of attention and MLP, by layer."""
    if not errors:
        return
    labels = [str(i) for i in range(len(errors))]
    for part, name in ((ATTENTION, "Attention"), (MLP, "MLP")):
        measured = [own.get(part) for own in errors]
        if not any(measured):
            continue
        predicted = [0.0 for _ in errors]
        for row in rows:
            layer = place(row.unit).layer
            if (
                row.kind != "block"
                and part_of(row) == part
                and layer.isdigit()
                and int(layer) < len(errors)
            ):
                predicted[int(layer)] += row.predicted_error
        series = {"predicted": [p or None for p in predicted], "measured": measured}
        if not any(predicted):
            series = {"measured": measured}
        yield Figure(name, charts.by_layer(f"Output error of {name}", labels, series))
    stream = [own.get("stream") for own in errors]
    if any(stream):
        yield Figure(
            "Residual stream",
            charts.by_layer(
                "Error of the residual stream after each layer", labels, {"measured": stream}
            ),
        )


def loss_figures(groups: dict[str, list[tuple[str, UnitRow]]]) -> Iterator[Figure]:
    """KL divergence of the model when one unit alone is compressed."""
    for group, own in groups.items():
        found = [row.predicted_loss for _, row in own]
        if len(own) > 1 and any(found):
            labels = [layer for layer, _ in own]
            title = title_of(group)
            yield Figure(
                title,
                charts.by_layer(
                    f"{title}: KL divergence of each unit alone",
                    labels,
                    {"nats": found},
                    charts.number,
                ),
            )


def total_loss(rows: Sequence[UnitRow]) -> float | None:
    """The sum of the predicted losses, which ignores interactions between units."""
    found = [row.predicted_loss for row in rows]
    return sum(x for x in found if x is not None) if found and None not in found else None


def layer_figure(title: str, name: str, values: Sequence[float]) -> Figure | None:
    """Chart of one value per layer."""
    if not any(values):
        return None
    labels = [str(i) for i in range(len(values))]
    return Figure(title, charts.by_layer(title, labels, {name: values}, charts.number))


def direction_figure(found: Sequence[dict[str, int]]) -> Figure | None:
    """Chart of how many principal directions hold most energy of the MLP activations."""
    if not any(found):
        return None
    labels = [str(i) for i in range(len(found))]
    series = {
        f"hold {share}": [
            own[key] / own["of"] if own.get("of") and key in own else None for own in found
        ]
        for key, share in (("0.9", "90%"), ("0.99", "99%"))
    }
    title = "Directions that hold the energy"
    return Figure(title, charts.by_layer(title, labels, series))


def curve_figures(
    groups: dict[str, list[tuple[str, UnitRow]]], told: dict[str, Any]
) -> Iterator[Figure]:
    """Chart of predicted error against size, one line per layer."""
    for group, own in groups.items():
        drawn = [
            [*zip(told[row.unit]["kept"], told[row.unit]["errors"], strict=False)]
            for _, row in own
            if row.unit in told
        ]
        if not any(len(points) > 2 for points in drawn):
            continue
        chosen = [
            (
                row.kept,
                row.predicted_error,
                f"{row.unit}: {row.said}, {percent(row.predicted_error)}",
            )
            for _, row in own
            if row.kept < 1
        ]
        title = title_of(group)
        yield Figure(title, charts.curves(f"{title}: error against size", drawn, chosen))
