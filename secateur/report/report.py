"""The report of a run: `report.json`, and the table that compares both models."""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from secateur.report import task_tables as outcome

VERSION = 2
HUGE = 1e6  # a perplexity above this is that of a destroyed model
TIERS = {
    "plain": "loads wherever the dense model loads, without extra code",
    "per-layer": "loads in transformers after `import secateur`, or with trust_remote_code=True",
    "factored": "loads in transformers after `import secateur`, or with trust_remote_code=True",
}


@dataclass(frozen=True)
class Report:
    """The content of `report.json`. Its keys are stable, as other tools read them."""

    content: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.content[key]

    def write(self, path: Path) -> None:
        """Write the report to a file as indented JSON."""
        path.write_text(json.dumps(self.content, indent=1) + "\n")

    def __str__(self) -> str:
        """The table of the dense and the compressed model as text."""
        from rich.console import Console

        console = Console(width=100, file=io.StringIO())
        with console.capture() as capture:
            console.print(comparison(self))
        return capture.get()


class Line(NamedTuple):
    """One row of the main table: the same in the terminal, on the page and in the model card.

    A cell is empty where a model has no such figure.
    """

    label: str
    dense: str
    compressed: str
    change: str


def lines(report: Report) -> list[Line]:
    """The rows of the main table: dense model, compressed model, change."""
    dense, small = report["dense"], report["compressed"]
    found: list[Line] = []

    def add(label: str, a: float, b: float, form: Any, change: str) -> None:
        ratio = b / a if a else 1.0  # zero where no memory was allocated
        note = {"share": f"{ratio:.1%}", "times": f"{ratio:.2f}×", "rise": rise(b, a)}
        found.append(Line(label, form(a), form(b), note[change] if a else ""))

    add("parameters", dense["parameters"], small["parameters"], count, "share")
    add("bytes on disk", dense["bytes"], small["bytes"], size, "share")
    for name, value in dense["perplexity"].items():
        add(f"perplexity, {name}", value, small["perplexity"][name], perplexity, "rise")
    for name, value in dense["tasks"].items():
        other = small["tasks"][name]
        points = f"{100 * (other - value):+.1f} points"
        found.append(Line(name, f"{value:.1%}", f"{other:.1%}", points))
    if agrees := small["agreement"]:
        name = next(iter(dense["perplexity"]), "")
        of = f"on {agrees['outputs']:,.0f} outputs"
        found.append(Line(f"top-1 agreement, {name}", "", f"{agrees['top1']:.1%}", of))
        found.append(Line("KL divergence from dense, nats", "", f"{agrees['kl']:.2g}", ""))
    things = "images" if dense["counts"] == "images" else "tokens"
    for key, label in (("prefill", f"prefill, {things}/s"), ("decode", "decode, tokens/s")):
        if (key := f"{key}_tokens_per_second") in dense["speed"].keys() & small["speed"].keys():
            add(label, dense["speed"][key], small["speed"][key], "{:,.0f}".format, "times")
    add("peak memory", dense["peak_memory_bytes"], small["peak_memory_bytes"], size, "share")
    return [*found, *_damage(dense.get("damage", {}), small.get("damage", {}))]


def _damage(dense: dict[str, Any], small: dict[str, Any]) -> Iterator[Line]:
    """Rows of the measurements that `--damage` asks for."""
    after = outcome.damage_lines(small, dense)
    for label, (value, unit) in outcome.damage_lines(dense).items():
        own = after[label][0]
        change = outcome.in_unit(own - value, unit, "+")
        yield Line(label, outcome.in_unit(value, unit), outcome.in_unit(own, unit), change)


def task_rows(report: Report) -> list[tuple[str, ...]]:
    """Task scores as rows of text, the header first; empty without tasks."""
    dense, small = report["dense"], report["compressed"]
    return outcome.task_rows(dense, small) if dense.get("task_scores") else []


def comparison(report: Report) -> Any:
    """The main table for a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    table = Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for column, justify in (
        ("", "left"),
        ("dense", "right"),
        ("compressed", "right"),
        ("", "right"),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for line in lines(report):
        table.add_row(*map(escape, line))
    return table


def told_tier(tier: str, libraries: list[str]) -> str:
    """What a tier means for loading the result."""
    needed = f"; needs {', '.join(libraries)}" if libraries else ""
    return f"tier {tier}: {TIERS.get(tier, 'unknown here')}{needed}"


def told_when(report: Report) -> str:
    """Say whether both models were measured in the same run."""
    if report.content.get("dense_shared"):
        return "The dense model was measured once for all runs of the sweep"
    return "Both models were measured in the same run"


def kept(budget: dict[str, Any], sees: bool) -> str:
    """What a budget asked for and what the plan reached; ``sees`` is true of image models."""
    total, read = budget["total"], f"{budget['batch']} × {budget['length']} tokens"
    if sees:
        read = f"a batch of {budget['batch']}"
    whole = {
        "parameters": f"{count(total)} compressible parameters",
        "bytes": f"{size(total)} of compressible weights",
        "flops": f"{count(total)} FLOPs per token in compressible layers",
        "cache": f"{size(total)} of KV cache per token",
        "latency": f"{total / 1e6:.2f} ms for {read}",
    }.get(budget["of"], budget["of"])
    return f"keeps {budget['reached']:.2%} of {whole} (asked for {budget['keep']:.2%})"


def summary(report: Report) -> str:
    """What a run kept, which method it used, and how long it took."""
    told = kept(report["budget"], report["dense"]["counts"] == "images")
    told += f", by {report['method']['name']}"
    total = report["seconds"].get("total")
    return told if total is None else f"{told} in {total:.0f} s"


def perplexity(value: float) -> str:
    """Two decimals; few digits where the model is destroyed."""
    return f"{value:.2f}" if value < HUGE else f"{value:.2g}"


def rise(value: float, dense: float) -> str:
    """The relative change in percent, or as a factor where it is very large."""
    ratio = value / dense if dense else 1.0
    return f"{ratio - 1:+.1%}" if ratio < HUGE else f"{ratio:.2g}×"


def count(number: float) -> str:
    """A count with a decimal unit."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.2f} {name}"
    return f"{number:.0f}"


def size(number: float) -> str:
    """Bytes with a decimal unit."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= unit:
            return f"{number / unit:.2f} {name}"
    return f"{number:.0f} B"
