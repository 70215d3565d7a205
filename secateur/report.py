"""What a run reports: report.json, and the table a person reads."""

import io
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur import outcome
from secateur.version import __version__


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


def versions() -> dict[str, str]:
    """Versions of everything that can change a number."""
    import numpy
    import safetensors
    import torch
    import transformers

    return {
        "secateur": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
        "numpy": numpy.__version__,
    }


def comparison(report: Report) -> Any:
    """A rich table: dense beside compressed, and the change."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    dense, small = report["dense"], report["compressed"]
    table = Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for column, justify in (
        ("", "left"),
        ("dense", "right"),
        ("compressed", "right"),
        ("", "right"),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]

    def row(label: str, a: float, b: float, form: Any, change: str) -> None:
        ratio = b / a if a else 1.0  # memory that the process had before, say
        note = {"share": f"{ratio:.1%}", "times": f"{ratio:.2f}×", "rise": f"{ratio - 1:+.1%}"}
        table.add_row(label, form(a), form(b), note[change] if a else "")

    row("parameters", dense["parameters"], small["parameters"], count, "share")
    row("bytes on disk", dense["bytes"], small["bytes"], size, "share")
    for name, value in dense["perplexity"].items():
        row(f"perplexity, {name}", value, small["perplexity"][name], "{:.2f}".format, "rise")
    for name, value in dense["tasks"].items():
        other = small["tasks"][name]
        table.add_row(name, f"{value:.1%}", f"{other:.1%}", f"{100 * (other - value):+.1f} points")
    if agrees := small["agreement"]:
        name = next(iter(dense["perplexity"]))
        of = f"of {agrees['outputs']:,.0f} outputs"
        table.add_row(f"same first choice, {name}", "", f"{agrees['top1']:.1%}", of)
        table.add_row("divergence from dense there, nats", "", f"{agrees['kl']:.2g}", "")
    things = "images" if dense["counts"] == "images" else "tokens"
    for key, label in (("prefill", f"reading, {things}/s"), ("decode", "writing, tokens/s")):
        if (key := f"{key}_tokens_per_second") in dense["speed"]:
            row(label, dense["speed"][key], small["speed"][key], "{:,.0f}".format, "times")
    row("peak memory", dense["peak_memory_bytes"], small["peak_memory_bytes"], size, "share")
    after = outcome.damage_lines(small["damage"], dense["damage"])
    for label, (value, unit) in outcome.damage_lines(dense["damage"]).items():
        own = after[label][0]
        change = outcome.in_unit(own - value, unit, "+")
        table.add_row(label, *(outcome.in_unit(v, unit) for v in (value, own)), change)
    return table


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
