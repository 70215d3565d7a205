"""Output of the commands: plain data for machines, tables of at most 100 columns for people."""

import shlex
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur import allocate, methods
from secateur.allocate.base import Allocator
from secateur.cli.options import DEFAULT_METHOD, shown
from secateur.data.tasks import PREFIX
from secateur.evaluate.measurements import Measurements
from secateur.evaluate.significance import doubts
from secateur.families import FAMILIES, find
from secateur.methods.base import Method
from secateur.methods.fitted import FittedMethod
from secateur.models.loading import DEMO, skeleton
from secateur.models.model import Settings, not_served
from secateur.planning.plan import Plan
from secateur.report import report as reporting
from secateur.report import task_tables as outcome
from secateur.report.console import terminal
from secateur.report.report import TIERS, Report, count, size
from secateur.structure.units import WIDTHS
from secateur.utils.errors import printable
from secateur.utils.registry import Registry

if TYPE_CHECKING:
    from secateur.export.gguf.export import Exported
    from secateur.export.onnx import Graph

SIDES = ("dense", "compressed")


def catalogue() -> dict[str, Any]:
    """Methods and allocators with their options, families, and which extensions can't be used."""
    found, problems = methods.REGISTRY.survey()
    spenders, others = allocate.REGISTRY.survey()
    return {
        "methods": [_entry(kind, methods.REGISTRY) | _usual(kind) for kind in found.values()],
        "allocators": [_entry(kind, allocate.REGISTRY) for kind in spenders.values()],
        "families": [{"name": f.family, "model_types": f.model_types} for f in FAMILIES],
        "problems": [*problems, *others],
    }


def _usual(kind: type[Method]) -> dict[str, Any]:
    """What a method keeps, of what, and who spends that, where nothing else is asked for.

    A method that decides all sizes itself has no allocator.
    """
    fitted = issubclass(kind, FittedMethod)
    return {
        "keep": kind.usual_keep,
        "target": kind.target,
        "allocator": None if fitted else kind().allocator.name,
    }


def _entry(kind: type[Method] | type[Allocator], registry: Registry) -> dict[str, Any]:
    package = registry.package(kind.name)
    return {
        "name": kind.name,
        "summary": kind.summary,
        "source": kind.source,
        "options": {
            f.name: {"default": f.default, "help": f.metadata["help"]} for f in fields(kind)
        },
    } | ({} if package is None else {"package": package})


def show_catalogue(content: dict[str, Any]) -> None:
    """Print the result of :func:`catalogue`."""
    console = terminal()
    for group in ("methods", "allocators"):
        console.print(f"[bold]{group}[/]")
        for entry in content[group]:
            said = f"{entry['summary']}  ({entry['source']})"
            said += f"  from {entry['package']}" if "package" in entry else ""
            console.print(f"  [bold]{entry['name']}[/]  {escape(said)}")
            for name, field in entry["options"].items():
                flag = "--" + name.replace("_", "-")
                default = shown(field["default"])
                console.print(f"    {flag:<18} {field['help']}  (default {default})")
            if group == "methods":
                asked = f"{entry['keep']} of the {entry['target']}"
                console.print(f"    {'--keep':<18} by default {asked}")
            if entry.get("allocator"):
                console.print(f"    {'--allocator':<18} by default {entry['allocator']}")
        console.print()
    console.print("[bold]families[/]")
    for family in content["families"]:
        console.print(f"    {family['name']:<18} model_type {', '.join(family['model_types'])}")
    if content["problems"]:
        console.print("\n[bold]extensions that can't be used[/]")
    for problem in content["problems"]:
        console.print(f"    {escape(printable(problem))}")


def inspection(source: str, settings: Settings, multiple_of: int) -> dict[str, Any]:
    """What can be compressed, from the config alone: the model is built without weights."""
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
        return content | {"family": None, "note": not_served(config)}
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
        "notes": model.obstacles_of(WIDTHS),
        "calibration_bytes": {
            "statistics_per_block": 8 * widest**2,
            "activations_per_1000_tokens": 4000 * config.hidden_size,
            "propagation_per_1000_tokens": 4 * 4000 * config.hidden_size,
        },
    }


def show_inspection(content: dict[str, Any]) -> None:
    """Print the result of :func:`inspection`."""
    console = terminal()
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
    console.print(f"not compressible: {count(stays)} parameters outside these units")
    for note in content["notes"]:
        console.print(f"note: {note}")
    need = content["calibration_bytes"]
    console.print(
        f"memory of calibration: the model, {size(need['statistics_per_block'])} of statistics for "
        f"one block at a time, and {size(need['activations_per_1000_tokens'])} of activations per "
        f"1000 tokens; methods that refit block after block, such as {DEFAULT_METHOD}, hold "
        f"{size(need['propagation_per_1000_tokens'])} per 1000 tokens while they prune"
    )
    images = " --calibration YOUR_IMAGES" if _sees(content["model_type"]) else ""
    _next(console, "plan", content["model"], f"--keep 0.8 --dry-run{images}")


def show_spectrum(content: dict[str, Any]) -> None:
    """Print the result of ``spectrum``: one row per method, one column per share of bytes."""
    console = terminal()
    table = Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("share of bytes")
    for share in content["shares"]:
        table.add_column(f"{share:.1%}", justify="right")
    best = [
        min((own[i] for own in content["methods"].values() if own[i] is not None), default=None)
        for i in range(len(content["shares"]))
    ]
    for name, errors in content["methods"].items():
        cells = ["–" if e is None else f"{e:.2%}" for e in errors]
        marked = zip(cells, errors, best, strict=True)
        table.add_row(
            name, *(f"[bold]{c}*[/]" if e is not None and e == b else c for c, e, b in marked)
        )
    console.print(table)
    console.print(
        "relative squared error of a layer's output, mean over all matrices, for the best form "
        "within that share of bytes; * smallest error, – no form is so small"
    )


def show_plan(plan: Plan, written: Path | None) -> None:
    """Print a plan, one line per unit."""
    console = terminal()
    curve = methods.method_class(plan.method.name).curve
    told = curve.partition(":")[0] if plan.predicted_loss is None else "predicted loss"
    own = [row.unit.rpartition(".")[0] for row in plan.units]  # the block of each
    several = len(set(own)) < len(own)
    table = Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("unit", "size", "kept", "bytes", told):
        table.add_column(column, justify="left" if column == "unit" else "right")
    for row, block, following in zip(plan.units, own, [*own[1:], None], strict=True):
        loss = row.predicted_loss
        table.add_row(
            row.unit,
            row.becomes or f"{row.before} → {row.after or 'removed'}",
            f"{row.bytes / row.dense_bytes if row.dense_bytes else row.after / row.before:.0%}",
            size(row.bytes),
            f"{row.predicted_error:.2%}" if loss is None else f"{loss:.5f}",
            end_section=following is None or (several and following != block),
        )
    console.print(table)
    console.print(reporting.kept(plan.budget.model_dump(), _sees(plan.base.model_type)))
    if plan.predicted_loss is None:
        console.print(curve)
    else:
        console.print(
            f"predicted loss: KL divergence from dense with only that unit compressed, in nats; "
            f"sum {plan.predicted_loss:.4f}"
        )
    console.print(reporting.told_tier(plan.tier, plan.libraries))
    if written is not None:
        _next(console, "compress", plan.base.source, f"OUT --plan {shlex.quote(str(written))}")
    else:
        console.print("\nno file was written; leave out --dry-run to write the plan")


def _sees(model_type: str) -> bool:
    """Whether a model reads images."""
    family = find(model_type.removeprefix(PREFIX))
    return family is not None and family.use == "images"


def show_report(report: Report, out: Path) -> None:
    """Print the report of a run and the next command."""
    console = terminal()
    _show_outcome(console, report)
    console.print(reporting.summary(report))
    if report["densified"]:
        console.print(
            f"note: {report['densified']} matrices are stored packed and unpacked to compute: this "
            "saves bytes on disk, but neither memory nor time (except 2:4 on GPUs with a kernel)"
        )
    _show_samples(console, report["dense"]["prompt"], {k: report[k]["sample"] for k in SIDES})
    tier = reporting.told_tier(report["tier"], report["libraries"])
    console.print(f"\n[bold]{escape(str(out))}[/]  {tier}")
    plans = "the plan of each step" if "steps" in report.content else "plan.json"
    console.print(f"its folder secateur/ holds report.json, {plans} and recipe.yaml", markup=False)
    if (page := out / "secateur" / "report.html").exists():
        console.print(f"report page: {page}", markup=False, soft_wrap=True)
    own = report["model"]["source"] == DEMO
    following = ("compress", "YOUR_MODEL", "OUT --keep 0.8 --calibration YOUR_TEXT.txt")
    yours = "YOUR_IMAGES" if _sees(report["model"]["model_type"]) else "YOUR_TEXT.txt"
    _next(console, *(following if own else ("eval", str(out), f"--eval {yours}")))


def show_comparison(report: Report) -> None:
    """Print a model beside the one that it is compared with."""
    console = terminal()
    _show_outcome(console, report)
    _show_samples(console, report["dense"]["prompt"], {k: report[k]["sample"] for k in SIDES})


def _show_outcome(console: Console, report: Report) -> None:
    """Print the tables of two models, and notes on what the figures don't show."""
    console.print(reporting.comparison(report))
    if report["dense"]["task_scores"]:
        console.print(outcome.task_comparison(report["dense"], report["compressed"]))
    for doubt in report["doubts"]:
        console.print(f"note: {doubt}", markup=False)


def show_export(out: Path, tier: str) -> None:
    """Print where an exported checkpoint is and what loads it."""
    console = terminal()
    console.print(f"[bold]{escape(str(out))}[/]  tier {tier}: {TIERS[tier]}")
    _next(console, "eval", str(out), "--eval YOUR_TEXT.txt")


def show_plain(out: Path, model_type: str) -> None:
    """Print where a checkpoint for stock classes is, and its model type."""
    console = terminal()
    console.print(f"[bold]{escape(str(out))}[/]  model_type {model_type}: {TIERS['plain']}")
    _next(console, "eval", str(out), "--eval YOUR_TEXT.txt")


def show_graph(out: Path, made: "Graph") -> None:
    """Print where an ONNX graph is, and how much onnxruntime differs from the model."""
    console = terminal()
    console.print(
        f"[bold]{escape(str(out))}[/]  {size(made.bytes)}; onnxruntime reproduces the model's "
        f"logits (largest difference {made.difference:.1g} standard deviations)"
    )


def show_gguf(out: Path, made: "Exported") -> None:
    """Print where a GGUF file is, and how much llama.cpp differs from the model."""
    console = terminal()
    console.print(
        f"[bold]{escape(str(out))}[/]  {made.kind}, {size(made.bytes)}, architecture "
        f"{made.architecture}"
    )
    found = made.finding
    if found is None:
        console.print("not checked: llama.cpp has not run this file")
    else:
        console.print(
            f"llama.cpp agrees with the model: {found.same} of {found.greedy} greedy tokens are "
            f"the same; logits differ by {found.root_mean_square:.1g} standard deviations on "
            f"average (root mean square) and by {found.largest:.1g} at most"
        )
    line = f"\nnext: llama-cli -m {shlex.quote(str(out))}"
    console.print(line, markup=False, soft_wrap=True)


def show_verdict(measurements: Measurements) -> None:
    """Print the figures of one model."""
    console = terminal()
    table = Table(show_header=False, box=SIMPLE_HEAD, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("parameters", count(measurements.parameters))
    table.add_row("bytes on disk", size(measurements.bytes))
    for name, value in measurements.perplexity.items():
        of = f"{measurements.tokens[name]:,} {measurements.counts}"
        table.add_row(f"perplexity, {escape(name)} ({of})", reporting.perplexity(value))
    for name, value in measurements.tasks.items():
        table.add_row(name, f"{value:.1%}")
    for key, value in measurements.speed.items():
        if key.endswith("per_second"):
            things = "images" if measurements.counts == "images" else "tokens"
            label = key.replace("_tokens_per_second", f", {things}/s")
            table.add_row(label, f"{value:,.0f}")
    table.add_row("peak memory", size(measurements.peak_memory_bytes))
    for label, (value, unit) in outcome.damage_lines(measurements.damage).items():
        table.add_row(label, outcome.in_unit(value, unit))
    console.print(table)
    if measurements.task_scores:
        console.print(outcome.task_table(measurements.task_scores))
    for doubt in doubts({"the model": measurements.task_scores}, {}):
        console.print(f"note: {doubt}", markup=False)
    _show_samples(console, measurements.prompt, {"model": measurements.sample})


def _next(console: Console, verb: str, target: str, rest: str) -> None:
    """Print the next command on one line, so that it can be copied."""
    line = f"\nnext: secateur {verb} {shlex.quote(target)} {rest}"
    console.print(line, markup=False, soft_wrap=True)


def _show_samples(console: Console, prompt: str, samples: dict[str, str]) -> None:
    """Print the prompt and each model's continuation; nothing if the model does not generate."""
    shown = {"prompt": prompt, **samples}
    for who, text in shown.items() if any(shown.values()) else ():
        paragraph = Text(f"\n{who}: ", style="bold")
        paragraph.append(" ".join(text.split()), style="")
        console.print(paragraph)
