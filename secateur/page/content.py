"""What stands on the report page, as plain values and pictures for the template."""

import re
import shlex
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

from markupsafe import Markup

from secateur.compare import TOLD
from secateur.names import short_name
from secateur.page import charts
from secateur.page.charts import Point, percent
from secateur.report import Report, lines, size, summary, told_tier
from secateur.runs import Run, UnitRow

KINDS = {
    "mlp": "MLP channels",
    "query_key": "Query and key width",
    "value_output": "Value width",
    "heads": "Heads",
    "block": "Whole blocks",
    "residual": "Residual stream",
}
ATTENTION, MLP = "attention", "mlp"
STAGES = {
    "open": "opening",
    "select": "choosing text",
    "calibrate": "calibrating",
    "curves": "scoring",
    "allocate": "choosing sizes",
    "apply": "narrowing",
    "save": "writing",
    "evaluate": "measuring",
}
SIGNS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Figure(NamedTuple):
    """A picture with its heading; ``note`` says how to read it."""

    name: str
    picture: Markup
    note: str = ""


class Place(NamedTuple):
    """Where a unit is: the layer, and what in it."""

    layer: str
    group: str


def content(run: Run, comparison: dict[str, Any] | None) -> dict[str, Any]:
    """Everything that the template shows; what the report has not is empty."""
    report = run.report
    dense, small = report["dense"], report["compressed"]
    again = f"secateur compress {shlex.quote(report['model']['source'])}"
    steps = [step["method"]["name"] for step in report["steps"]] or [report["method"]["name"]]
    return {
        "name": short_name(report["model"]["source"]),
        "summary": summary(report),
        "tier": told_tier(report["tier"], report["libraries"]).replace("`", ""),
        "tiles": tiles(report),
        "lines": lines(report),
        "densified": report["densified"],
        "comparison": comparison and compared(comparison, str(run.folder)),
        "steps": [
            step_figures(name, rows or (), seen or {})
            for name, rows, seen in zip_longest(steps, run.plans, report["observed"])
            if name is not None
        ],
        "agreement": small["agreement"],
        "speed": [*speed(report)],
        "seconds": [
            (told, report["seconds"][key])
            for key, told in STAGES.items()
            if report["seconds"].get(key)
        ],
        "prompt": dense["prompt"],
        "samples": samples(dense["sample"], small["sample"]),
        "facts": [*facts(report)],
        "options": [*options(report)],
        "command": report["command"],
        "again": f"{again} OUT --recipe recipe.yaml",
        "recipe": run.recipe,
        "versions": report["versions"],
    }


def tiles(report: Report) -> list[tuple[str, str, str]]:
    """The three or four figures to see first: label, figure, and what it is beside."""
    dense, small = report["dense"], report["compressed"]
    found = [
        (
            "bytes on disk",
            f"{small['bytes'] / dense['bytes']:.1%}",
            f"{size(small['bytes'])} of {size(dense['bytes'])}",
        )
    ]
    for name, value in [*dense["perplexity"].items()][:1]:
        other = small["perplexity"][name]
        rise = f"{other / value - 1:+.1%}" if value else ""
        found.append(("perplexity", rise, f"{value:.2f} → {other:.2f}, {name}"))
    if agrees := small["agreement"]:
        found.append(
            ("same first choice", f"{agrees['top1']:.1%}", f"of {agrees['outputs']:,.0f} outputs")
        )
    for key, told in (("decode", "writing"), ("prefill", "reading")):
        rate = f"{key}_tokens_per_second"
        if dense["speed"].get(rate) and rate in small["speed"]:
            a, b = dense["speed"][rate], small["speed"][rate]
            things = "images" if dense["counts"] == "images" else "tokens"
            found.append((f"{told} speed", f"{b / a:.2f}×", f"{a:,.0f} → {b:,.0f} {things}/s"))
            break
    return found


def compared(comparison: dict[str, Any], own: str | None = None) -> dict[str, Any]:
    """The frontiers of several runs, and a row each; ``own`` is the folder of the page's run."""
    entries = [comparison["dense"], *comparison["runs"]]
    signs = ["dense", *(SIGNS[i] if i < len(SIGNS) else str(i + 1) for i in range(len(entries)))]
    signed = [*zip(signs, entries, strict=False)]
    figures = []
    for axis, name, form in AXES:
        found = [
            Point(
                sign,
                entry["name"],
                entry[axis],
                entry["perplexity"],
                best=entry["frontier"][axis],
                dense=sign == "dense",
                own=own is not None and entry.get("folder") == own,
            )
            for sign, entry in signed
            if entry[axis] is not None
        ]
        if len(found) > 1:
            title = f"Perplexity against {name}"
            figures.append(Figure(title, charts.frontier(title, name, found, form)))
    rows = [
        {
            **entry,
            "sign": "" if sign == "dense" else sign,
            "own": own is not None and entry.get("folder") == own,
            "size": size(entry["bytes"]),
            "beaten": [TOLD[axis] for axis, *_ in AXES if entry["frontier"].get(axis) is False],
        }
        for sign, entry in signed
    ]
    told = {"notes": comparison["notes"], "text": comparison["text"]}
    return {"figures": figures, "rows": rows, **told}


def standalone(comparison: dict[str, Any]) -> str:
    """The frontiers as one SVG file, with the names of the runs below."""
    found = compared(comparison)
    names = [f"{row['sign']}  {row['name']}" for row in found["rows"] if row["sign"]]
    title = f"Perplexity on {comparison['text']} against cost"
    return charts.sheet(title, [figure.picture for figure in found["figures"]], names)


def milliseconds(value: float) -> str:
    """A time beside an axis."""
    return f"{value:.3g} ms"


def short_size(value: float) -> str:
    """Bytes beside an axis."""
    return charts.number(value) + "B" if value else "0"


AXES = (
    ("bytes", "bytes on disk", short_size),
    ("reading_ms", "reading a prompt", milliseconds),
    ("writing_ms", "writing a token", milliseconds),
)


def place(unit: str) -> Place:
    """Of ``layers.3.mlp``, or of ``encoder.layers.3.mlp`` and the like."""
    found = re.fullmatch(r"(.*?)\.?(?:layers|h|block|layer)\.(\d+)\.(.+)", unit)
    if found is None:
        return Place("", unit)
    before, layer, group = found.groups()
    return Place(layer, f"{before} {group}".strip())


def step_figures(name: str, rows: Sequence[UnitRow], seen: dict[str, Any]) -> dict[str, Any]:
    """All pictures of one step, and its table of units."""
    groups: dict[str, list[tuple[str, UnitRow]]] = {}
    for row in rows:
        layer, group = place(row.unit)
        groups.setdefault(group, []).append((layer, row))
    changing = {g: own for g, own in groups.items() if any(r.kept != 1 for _, r in own)}
    errors = seen.get("errors") or []
    return {
        "name": name,
        "sizes": [
            Figure(KINDS.get(group, group), kept_figure(group, own))
            for group, own in changing.items()
            if len(own) > 1
        ],
        "still": [KINDS.get(g, g) for g in groups if g not in changing],
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
    """What a unit costs alone, where that was measured."""
    return "" if row.predicted_loss is None else f"{row.predicted_loss:.2g}"


def kept_figure(group: str, own: Sequence[tuple[str, UnitRow]]) -> Markup:
    """Sizes by layer."""
    told = [f"{row.unit}: {row.said} ({row.kept:.0%})" for _, row in own]
    title = f"{KINDS.get(group, group)} kept, by layer"
    return charts.kept(title, [layer for layer, _ in own], [row.kept for _, row in own], told)


def part_of(row: UnitRow) -> str:
    """What of a block a unit is in."""
    inside = row.unit.lower()
    known = ("attention", "attn", "query", "value", "heads", "q_proj", "k_proj", "v_proj", "o_proj")
    return ATTENTION if any(word in inside for word in known) else MLP


def error_figures(
    rows: Sequence[UnitRow], errors: Sequence[dict[str, float | None]]
) -> Iterator[Figure]:
    """Predicted and measured loss of output, of attention and MLP by layer."""
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
        yield Figure(name, charts.by_layer(f"Output lost by {name}", labels, series))
    stream = [own.get("stream") for own in errors]
    if any(stream):
        yield Figure(
            "Residual stream",
            charts.by_layer("Residual stream behind a layer, lost", labels, {"measured": stream}),
        )


def loss_figures(groups: dict[str, list[tuple[str, UnitRow]]]) -> Iterator[Figure]:
    """Divergence with one unit alone narrowed."""
    for group, own in groups.items():
        found = [row.predicted_loss for _, row in own]
        if len(own) > 1 and any(found):
            labels = [layer for layer, _ in own]
            title = KINDS.get(group, group)
            yield Figure(
                title,
                charts.by_layer(
                    f"{title}, divergence alone", labels, {"nats": found}, charts.number
                ),
            )


def total_loss(rows: Sequence[UnitRow]) -> float | None:
    """What all units together cost, if they don't interact."""
    found = [row.predicted_loss for row in rows]
    return sum(x for x in found if x is not None) if found and None not in found else None


def layer_figure(title: str, name: str, values: Sequence[float]) -> Figure | None:
    """One even value a layer."""
    if not any(values):
        return None
    labels = [str(i) for i in range(len(values))]
    return Figure(title, charts.by_layer(title, labels, {name: values}, charts.number))


def direction_figure(found: Sequence[dict[str, int]]) -> Figure | None:
    """How many directions of what the MLP hands on hold most of its energy."""
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
    """Predicted error against size, a line a layer."""
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
        title = KINDS.get(group, group)
        yield Figure(title, charts.curves(f"{title}: error against size", drawn, chosen))


def speed(report: Report) -> Iterator[Markup]:
    """Speed and memory as pairs of bars."""
    dense, small = report["dense"], report["compressed"]
    things = "images" if dense["counts"] == "images" else "tokens"
    for key, told in (("prefill", f"reading, {things}/s"), ("decode", "writing, tokens/s")):
        rate = f"{key}_tokens_per_second"
        if rate in dense["speed"] and rate in small["speed"]:
            a, b = dense["speed"][rate], small["speed"][rate]
            yield charts.pair(told, a, b, (f"{a:,.0f}", f"{b:,.0f}"))
    for key, told in (("peak_memory_bytes", "peak memory"), ("bytes", "bytes on disk")):
        a, b = dense[key], small[key]
        if a:
            yield charts.pair(told, a, b, (size(a), size(b)))


def samples(dense: str, small: str) -> dict[str, tuple[str, str]]:
    """Both continuations, each as what they share and what they don't."""
    a, b = dense.split(), small.split()
    same = next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
    if not a and not b:
        return {}
    sides = {"dense": a, "compressed": b}
    return {side: (" ".join(words[:same]), " ".join(words[same:])) for side, words in sides.items()}


def facts(report: Report) -> Iterator[tuple[str, str]]:
    """What was asked for and read."""
    model, text = report["model"], report["calibration"]
    yield "model", model["source"]
    if model["fingerprint"]:
        yield "fingerprint", model["fingerprint"]
    yield "method", report["method"]["name"]
    if report["allocator"]:
        yield "allocator", report["allocator"]["name"]
    budget = report["budget"]
    yield "budget", f"{budget['keep']:.2%} of {budget['of']}, reached {budget['reached']:.2%}"
    yield "tier", report["tier"]
    if text:
        told = f"{text.get('samples')} × {text.get('length')} tokens of {text.get('source')}"
        yield "calibration", f"{told}, seed {text.get('seed')}"
    for name, amount in report["dense"]["tokens"].items():
        yield "judged on", f"{name}, {amount:,} {report['dense']['counts']}"


def options(report: Report) -> Iterator[tuple[str, str]]:
    """Every option of what was used, by its name."""
    for step in report["steps"] or [report.content]:
        for key in ("method", "allocator"):
            named = step.get(key) or {}
            given = named.get("options") or {}
            if given:
                told = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in given.items())
                yield f"options of {named.get('name')}", told
