"""What the commands show: plain data for machines, tables of at most 100 columns for people."""

import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur import report as reporting
from secateur.anatomy import FAMILIES
from secateur.evaluate.judge import Verdict
from secateur.methods import METHODS, method_class
from secateur.model import DEMO, Settings, skeleton, unknown_family
from secateur.plan import Plan, Row
from secateur.report import Report, count, size

WIDTH = 100
SIDES = ("dense", "compressed")
TIERS = {
    "plain": "loads wherever the dense model does, no extra code",
    "per-layer": "loads in transformers after `import secateur`, or with trust_remote_code=True",
}


def _console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal or console.width > WIDTH:
        console = Console(highlight=False, width=WIDTH)
    return console


def catalogue() -> dict[str, Any]:
    """Methods with their options, and families."""
    methods = [method_class(name) for name in METHODS]
    return {
        "methods": [
            {
                "name": method.name,
                "summary": method.summary,
                "source": method.source,
                "options": {
                    f.name: {"default": f.default, "help": f.metadata["help"]}
                    for f in fields(method)
                },
            }
            for method in methods
        ],
        "families": [{"name": f.family, "model_types": f.model_types} for f in FAMILIES],
    }


def show_catalogue(content: dict[str, Any]) -> None:
    """Print :func:`catalogue`."""
    console = _console()
    for method in content["methods"]:
        console.print(f"[bold]{method['name']}[/]  {method['summary']}  ({method['source']})")
        for name, entry in method["options"].items():
            flag = "--" + name.replace("_", "-")
            console.print(f"    {flag:<18} {entry['help']}  (default {entry['default']:g})")
    console.print("\n[bold]families[/]")
    for family in content["families"]:
        console.print(f"    {family['name']:<18} model_type {', '.join(family['model_types'])}")


def inspection(source: str, settings: Settings, multiple_of: int) -> dict[str, Any]:
    """What can shrink, from the config alone: the model is built without storage."""
    model = skeleton(source, settings)
    module, config, stored = model.module, model.config, model.stored
    total = sum(p.numel() for p in module.parameters())
    linears = [m for m in module.modules() if isinstance(m, (nn.Linear, Conv1D))]
    content: dict[str, Any] = {
        "model": source,
        "model_type": config.model_type,
        "parameters": total,
        "bytes": total * stored.itemsize,
        "linear_layers": len(linears),
    }
    if model.anatomy is None:
        return content | {"family": None, "note": unknown_family(config.model_type)}
    units = model.units(multiple_of)
    compressible = sum(unit.parameters(unit.size) for unit in units)
    kinds = dict.fromkeys(unit.kind for unit in units)
    widest = max(unit.size for unit in units)
    return content | {
        "family": model.anatomy.family,
        "blocks": len(model.blocks),
        "compressible_parameters": compressible,
        "units": [
            {
                "kind": kind,
                "count": len(same := [u for u in units if u.kind == kind]),
                "size": max(u.size for u in same),
                "step": same[0].step,
                "parameters": sum(u.parameters(u.size) for u in same),
            }
            for kind in kinds
        ],
        "notes": model.obstacles,
        "calibration_bytes": {
            "statistics_per_block": 8 * widest**2,
            "activations_per_1000_tokens": 4000 * config.hidden_size,
        },
    }


def show_inspection(content: dict[str, Any]) -> None:
    """Print :func:`inspection`."""
    console = _console()
    head = f"[bold]{escape(content['model'])}[/]  {content['model_type']}, "
    console.print(
        f"{head}{count(content['parameters'])} parameters, {size(content['bytes'])}, "
        f"{content['linear_layers']} linear layers"
    )
    if content["family"] is None:
        console.print(content["note"])
        return
    table = Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("unit", "blocks", "size", "in steps of", "parameters", "share of model"):
        table.add_column(name, justify="left" if name == "unit" else "right")
    for unit in content["units"]:
        share = unit["parameters"] / content["parameters"]
        cells = (unit["count"], unit["size"], unit["step"], count(unit["parameters"]))
        table.add_row(unit["kind"], *map(str, cells), f"{share:.1%}")
    console.print(table)
    stays = content["parameters"] - content["compressible_parameters"]
    console.print(f"stays as it is: {count(stays)} parameters outside these units")
    for note in content["notes"]:
        console.print(f"note: {note}")
    need = content["calibration_bytes"]
    console.print(
        f"calibration holds the model, {size(need['statistics_per_block'])} of statistics for one "
        f"block at a time and {size(need['activations_per_1000_tokens'])} per 1000 tokens"
    )
    _next(console, "plan", content["model"], "--keep 0.8 --dry-run")


def show_plan(plan: Plan, written: Path | None) -> None:
    """Print a plan: one line a block, one column a kind of unit."""
    console = _console()
    kinds = list(dict.fromkeys(row.kind for row in plan.units))
    table = Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("block", justify="right")
    for kind in kinds:
        table.add_column(kind.replace("_", "/"), justify="right")
        table.add_column("error", justify="right")
    table.add_column("bytes", justify="right")
    blocks: dict[str, dict[str, Row]] = {}
    for row in plan.units:
        blocks.setdefault(row.unit.split(".")[1], {})[row.kind] = row
    for index, rows in blocks.items():
        cells: list[str] = []
        for kind in kinds:
            unit = rows.get(kind)
            cells += (
                ["", ""]
                if unit is None
                else [f"{unit.before} → {unit.after}", f"{unit.predicted_error:.1%}"]
            )
        table.add_row(index, *cells, size(sum(row.bytes for row in rows.values())))
    console.print(table)
    budget = plan.budget
    console.print(
        f"keeps {budget.reached:.2%} of {count(budget.total)} compressible parameters "
        f"(asked for {budget.keep:.2%}); error: predicted share of a unit's output that is lost"
    )
    console.print(f"tier {plan.tier}: {TIERS[plan.tier]}")
    if written is not None:
        _next(console, "compress", plan.base.source, f"OUT --plan {shlex.quote(str(written))}")
    else:
        console.print("\nnothing was written; without --dry-run the plan becomes a file")


def show_report(report: Report, out: Path) -> None:
    """Print what a run reports, and what to type next."""
    console = _console()
    console.print(reporting.comparison(report))
    budget = report["budget"]
    console.print(
        f"kept {budget['reached']:.2%} of the compressible parameters "
        f"(asked for {budget['keep']:.2%}) with {report['method']['name']} "
        f"in {report['seconds']['total']:.0f} s"
    )
    _show_samples(console, report["dense"]["prompt"], {k: report[k]["sample"] for k in SIDES})
    console.print(f"\n[bold]{escape(str(out))}[/]  tier {report['tier']}: {TIERS[report['tier']]}")
    console.print("in it, under secateur/: report.json, plan.json, recipe.yaml", markup=False)
    own = report["model"]["source"] == DEMO
    following = ("compress", "YOUR_MODEL", "OUT --keep 0.8 --calibration YOUR_TEXT.txt")
    _next(console, *(following if own else ("eval", str(out), "--eval YOUR_TEXT.txt")))


def show_verdict(verdict: Verdict) -> None:
    """Print what was measured of one model."""
    console = _console()
    table = Table(show_header=False, box=SIMPLE_HEAD, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("parameters", count(verdict.parameters))
    table.add_row("bytes on disk", size(verdict.bytes))
    for name, value in verdict.perplexity.items():
        table.add_row(f"perplexity, {name} ({verdict.tokens[name]:,} tokens)", f"{value:.2f}")
    for key, value in verdict.speed.items():
        if key.endswith("per_second"):
            table.add_row(key.replace("_", " "), f"{value:,.0f}")
    table.add_row("peak memory", size(verdict.peak_memory_bytes))
    console.print(table)
    _show_samples(console, verdict.prompt, {"model": verdict.sample})


def _next(console: Console, verb: str, target: str, rest: str) -> None:
    """The command to type next, on one line so that it can be copied."""
    line = f"\nnext: secateur {verb} {shlex.quote(target)} {rest}"
    console.print(line, markup=False, soft_wrap=True)


def _show_samples(console: Console, prompt: str, samples: dict[str, str]) -> None:
    """A prompt and what each model goes on with, a paragraph each."""
    for who, text in {"prompt": prompt, **samples}.items():
        paragraph = Text(f"\n{who}: ", style="bold")
        paragraph.append(" ".join(text.split()), style="")
        console.print(paragraph)
