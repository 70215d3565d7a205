"""What a run reports: report.json, and the table a person reads."""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from secateur.report import task_tables as outcome

VERSION = 2
HUGE = 1e6  # beyond it a perplexity is that of a wrecked model
TIERS = {
    "plain": "loads wherever the dense model does, no extra code",
    "per-layer": "loads in transformers after `import secateur`, or with trust_remote_code=True",
    "factored": "loads in transformers after `import secateur`, or with trust_remote_code=True",
}


@dataclass(frozen=True)
class Report:
    """The content of report.json; the keys are stable, other tools read them."""

    content: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.content[key]

    def write(self, path: Path) -> None:
        """Write it as indented JSON."""
        path.write_text(json.dumps(self.content, indent=1) + "\n")

    def __str__(self) -> str:
        """The dense-beside-compressed table as text."""
        from rich.console import Console

        console = Console(width=100, file=io.StringIO())
        with console.capture() as capture:
            console.print(comparison(self))
        return capture.get()


class Line(NamedTuple):
    """One line of the headline table in words, the same at the terminal, on the page, in the card.

    What one side has not is empty.
    """

    label: str
    dense: str
    compressed: str
    change: str


def lines(report: Report) -> list[Line]:
    """Dense beside compressed, and the change."""
    dense, small = report["dense"], report["compressed"]
    found: list[Line] = []

    def add(label: str, a: float, b: float, form: Any, change: str) -> None:
        ratio = b / a if a else 1.0  # memory that the process had before, say
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
        of = f"of {agrees['outputs']:,.0f} outputs"
        found.append(Line(f"same first choice, {name}", "", f"{agrees['top1']:.1%}", of))
        found.append(Line("divergence from dense there, nats", "", f"{agrees['kl']:.2g}", ""))
    things = "images" if dense["counts"] == "images" else "tokens"
    for key, label in (("prefill", f"reading, {things}/s"), ("decode", "writing, tokens/s")):
        if (key := f"{key}_tokens_per_second") in dense["speed"].keys() & small["speed"].keys():
            add(label, dense["speed"][key], small["speed"][key], "{:,.0f}".format, "times")
    add("peak memory", dense["peak_memory_bytes"], small["peak_memory_bytes"], size, "share")
    return [*found, *_damage(dense.get("damage", {}), small.get("damage", {}))]


def _damage(dense: dict[str, Any], small: dict[str, Any]) -> Iterator[Line]:
    """What perplexity does not show, where that was asked for."""
    after = outcome.damage_lines(small, dense)
    for label, (value, unit) in outcome.damage_lines(dense).items():
        own = after[label][0]
        change = outcome.in_unit(own - value, unit, "+")
        yield Line(label, outcome.in_unit(value, unit), outcome.in_unit(own, unit), change)


def task_rows(report: Report) -> list[tuple[str, ...]]:
    """Scores of tasks as rows of words, the first of them the heads; none where none was asked."""
    dense, small = report["dense"], report["compressed"]
    return outcome.task_rows(dense, small) if dense.get("task_scores") else []


def comparison(report: Report) -> Any:
    """The headline table for a terminal."""
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
    """What a tier means to who loads the result."""
    needed = f"; needs {', '.join(libraries)}" if libraries else ""
    return f"tier {tier}: {TIERS.get(tier, 'unknown here')}{needed}"


def told_when(report: Report) -> str:
    """Whether the figures of both models are of one run."""
    if report.content.get("dense_shared"):
        return "The dense model was measured once for all runs of a sweep"
    return "Both were measured in the same run"


def kept(budget: dict[str, Any], sees: bool) -> str:
    """What a budget asked for and what it got; of a model that ``sees``, in images."""
    total, read = budget["total"], f"{budget['batch']} × {budget['length']} tokens"
    if sees:
        read = f"a batch of {budget['batch']}"
    whole = {
        "parameters": f"{count(total)} compressible parameters",
        "bytes": f"{size(total)} that can shrink",
        "flops": f"{count(total)} operations a token in what can shrink",
        "cache": f"{size(total)} of KV cache a token",
        "latency": f"{total / 1e6:.2f} ms for {read}",
    }.get(budget["of"], budget["of"])
    return f"keeps {budget['reached']:.2%} of {whole} (asked for {budget['keep']:.2%})"


def summary(report: Report) -> str:
    """What a run has kept, by what, and how long that took."""
    told = kept(report["budget"], report["dense"]["counts"] == "images")
    told += f", by {report['method']['name']}"
    total = report["seconds"].get("total")
    return told if total is None else f"{told} in {total:.0f} s"


def perplexity(value: float) -> str:
    """Two decimals, but of a wrecked model few digits."""
    return f"{value:.2f}" if value < HUGE else f"{value:.2g}"


def rise(value: float, dense: float) -> str:
    """How much higher it is; where percents would say nothing, how many times."""
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
