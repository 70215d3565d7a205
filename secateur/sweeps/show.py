"""Output of sweeps in a terminal."""

import shlex
from pathlib import Path
from typing import Any

from secateur.report.console import terminal
from secateur.report.frontier_table import SHEETS, show


def show_list(content: dict[str, Any]) -> None:
    """Print the runs of a sweep, one line each, and what they share."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    console = terminal()
    table = Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("run", "method", "keep", "allocator", "statistics", "scores", ""):
        table.add_column(column, justify="right" if column == "keep" else "left", overflow="fold")
    for run in content["runs"]:
        todo, keep = run["state"] == "to do", run["keep"]
        own = "its own" if todo else ""
        row = (
            run["name"],
            " + ".join(step.get("method", "") for step in run["steps"]),
            keep if isinstance(keep, str) else "" if keep is None else f"{keep:g}",
            run["steps"][0]["allocator"] if len(run["steps"]) == 1 else "",
            run["statistics_of"] or own,
            run["scores_of"] or own,
            run["state"],
        )
        table.add_row(*map(escape, row), style=None if todo else "dim")
    console.print(table)
    todo = [run for run in content["runs"] if run["state"] == "to do"]
    console.print(
        f"{len(todo)} of {len(content['runs'])} runs to do in {escape(content['out'])}, in this "
        f"order; the dense model is measured once. No run was started."
    )
    _reasons({run["name"]: run["reason"] for run in content["runs"] if run["reason"]})


def show_outcome(content: dict[str, Any]) -> None:
    """Print the comparison of finished runs, and why others failed."""
    if "runs" in content:
        show(content)
    _reasons(content["failed"])
    if "runs" in content:
        page = shlex.quote(str(Path(content["out"], SHEETS[0])))
        terminal().print(f"\nreport page: {page}", markup=False, soft_wrap=True)


def _reasons(failed: dict[str, str]) -> None:
    for name, reason in failed.items():
        terminal().print(f"failed: {name}: {reason}", markup=False)
