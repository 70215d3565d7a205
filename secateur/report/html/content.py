"""The content of the report page: values and pictures for the template."""

import shlex
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from secateur.report.frontier_table import TOLD
from secateur.report.html import charts
from secateur.report.html.charts import Point
from secateur.report.html.steps import Figure, step_figures
from secateur.report.report import (
    Report,
    lines,
    perplexity,
    rise,
    size,
    summary,
    task_rows,
    told_tier,
    told_when,
)
from secateur.report.run_records import RECORD, Run
from secateur.utils.naming import short_name

STAGES = {
    "open": "loading",
    "select": "choosing calibration text",
    "calibrate": "calibrating",
    "curves": "scoring units",
    "allocate": "allocating the budget",
    "apply": "pruning and refitting",
    "save": "saving",
    "evaluate": "evaluating",
}
SIGNS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def content(run: Run, comparison: dict[str, Any] | None) -> dict[str, Any]:
    """The values of the template; empty where the report has nothing."""
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
        "measured": told_when(report),
        "tasks": task_rows(report),
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
    """The three or four main figures: label, figure, and the values behind it."""
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
        both = f"{perplexity(value)} → {perplexity(other)}, {name}"
        found.append(("perplexity", rise(other, value), both))
    if agrees := small["agreement"]:
        found.append(
            ("top-1 agreement", f"{agrees['top1']:.1%}", f"on {agrees['outputs']:,.0f} outputs")
        )
    for phase in ("decode", "prefill"):
        rate = f"{phase}_tokens_per_second"
        if dense["speed"].get(rate) and rate in small["speed"]:
            a, b = dense["speed"][rate], small["speed"][rate]
            things = "images" if dense["counts"] == "images" else "tokens"
            found.append((f"{phase} speed", f"{b / a:.2f}×", f"{a:,.0f} → {b:,.0f} {things}/s"))
            break
    return found


def compared(
    comparison: dict[str, Any], own: str | None = None, linked: bool = False
) -> dict[str, Any]:
    """Frontiers of several runs, and a table row for each.

    ``own`` is the folder of the run that the page is about. With ``linked``, each row links to the
    page of its run.
    """
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
            "link": f"{quote(entry['name'])}/{RECORD}/report.html"
            if linked and sign != "dense"
            else "",
            "size": size(entry["bytes"]),
            "told": perplexity(entry["perplexity"]),
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
    """A time as an axis label."""
    return f"{value:.3g} ms"


def short_size(value: float) -> str:
    """Bytes as an axis label."""
    return charts.number(value) + "B" if value else "0"


AXES = (
    ("bytes", "bytes on disk", short_size),
    ("prefill_ms", "prefill of one prompt", milliseconds),
    ("decode_ms", "decode of one token", milliseconds),
)


def speed(report: Report) -> Iterator[Markup]:
    """Bar charts of speed, memory and size."""
    dense, small = report["dense"], report["compressed"]
    things = "images" if dense["counts"] == "images" else "tokens"
    for key, told in (("prefill", f"prefill, {things}/s"), ("decode", "decode, tokens/s")):
        rate = f"{key}_tokens_per_second"
        if rate in dense["speed"] and rate in small["speed"]:
            a, b = dense["speed"][rate], small["speed"][rate]
            yield charts.pair(told, a, b, (f"{a:,.0f}", f"{b:,.0f}"))
    for key, told in (("peak_memory_bytes", "peak memory"), ("bytes", "bytes on disk")):
        a, b = dense[key], small[key]
        if a:
            yield charts.pair(told, a, b, (size(a), size(b)))


def samples(dense: str, small: str) -> dict[str, tuple[str, str]]:
    """Both continuations, each split into the common beginning and the rest."""
    a, b = dense.split(), small.split()
    same = next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
    if not a and not b:
        return {}
    sides = {"dense": a, "compressed": b}
    return {side: (" ".join(words[:same]), " ".join(words[same:])) for side, words in sides.items()}


def facts(report: Report) -> Iterator[tuple[str, str]]:
    """Model, method, budget, calibration data and evaluation texts of the run."""
    model, text = report["model"], report["calibration"]
    yield "model", model["source"]
    if model["fingerprint"]:
        yield "fingerprint", model["fingerprint"]
    yield "method", report["method"]["name"]
    if report["allocator"]:
        yield "allocator", report["allocator"]["name"]
    budget = report["budget"]
    kept = f"{budget['keep']:.2%}" if budget["keep"] else "as little as possible"
    yield "budget", f"{kept} of {budget['of']}, reached {budget['reached']:.2%}"
    yield "tier", report["tier"]
    if text:
        told = f"{text.get('samples')} × {text.get('length')} tokens of {text.get('source')}"
        yield "calibration", f"{told}, seed {text.get('seed')}"
    for name, amount in report["dense"]["tokens"].items():
        yield "evaluated on", f"{name}, {amount:,} {report['dense']['counts']}"


def options(report: Report) -> Iterator[tuple[str, str]]:
    """All options of the methods and allocators that were used."""
    for step in report["steps"] or [report.content]:
        for key in ("method", "allocator"):
            named = step.get(key) or {}
            given = named.get("options") or {}
            if given:
                told = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in given.items())
                yield f"options of {named.get('name')}", told
