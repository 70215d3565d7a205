"""What a page about methods ends with: docstring, options and figures of each, from the source."""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from scripts.docs.links import ROOT, prose_lines
from scripts.docs.markdown import docstring, table
from secateur.cli.options import shown
from secateur.methods import METHODS, method_class

RESULTS = ROOT / "benchmarks" / "RESULTS.md"
MEASURED = ("Frontier", "Forms")  # sections of it that compare methods


def page_of(method: str) -> Path:
    """The page about a method: the one whose "Code:" paragraph names its file.

    Raises:
        LookupError: there is none, or there are several.
    """
    found = [page for page in sorted((ROOT / "docs/methods").glob("*.md")) if method in on(page)]
    if len(found) != 1:
        names = ", ".join(page.name for page in found) or "no page"
        raise LookupError(
            f"method {method!r} should be under Code: on one page of docs/methods, "
            f"and is on {names}"
        )
    return found[0]


def on(page: Path) -> list[str]:
    """The methods that a page is about, in its order."""
    code = re.search(r"\bCode: .*?(?=Sources?: |\n\n)", page.read_text(), re.S)
    named = re.findall(r"`(?:secateur/methods/)?(\w+)\.py`", code[0]) if code else []
    return [name for file in named for name in METHODS if home(name) == file]


def home(method: str) -> str:
    """The file of a method, without its ending."""
    return METHODS[method].partition(":")[0].rpartition(".")[2]


def section(page: Path) -> str:
    """What is added to a page; empty where it is about no method."""
    names = on(page)
    return "".join(f"\n## Reference: {name}\n\n{reference(name, page)}" for name in names)


def reference(name: str, page: Path) -> str:
    """One method."""
    kind = method_class(name)
    options = [
        [
            f"`--{field.name.replace('_', '-')}`",
            f"`{shown(field.default)}`" if shown(field.default) else "",
            interval(field.metadata),
            field.metadata["help"],
        ]
        for field in fields(kind)
    ]
    return (
        f"`--method {name}`, `secateur.{kind.__name__}`: {kind.summary} ({kind.source}). "
        f"By default `--allocator {kind().allocator.name}`, `--target {kind.target}`.\n\n"
        f"{docstring(kind)}\n\n"
        + table(["option", "default", "values", "meaning"], options)
        + figures(name)
    )


def interval(metadata: Any) -> str:
    """The values that an option may have."""
    low, high = metadata["low"], metadata["high"]
    if low is None:
        return "" if high is None else f"to {high:g}"
    return f"from {low:g}" if high is None else f"{low:g} to {high:g}"


@dataclass
class Measured:
    """A table of the benchmarks.

    Attributes:
        title: the heading that it is under; the model.
        about: what stands above it.
        command: that printed it.
        head: its header line.
        rows: lines by their first cell.
    """

    title: str
    about: str
    command: str
    head: list[str]
    rows: dict[str, list[str]]


def measured(text: str) -> Iterator[Measured]:
    """The tables of RESULTS.md that have a row a method."""
    part = title = about = command = ""
    table: Measured | None = None
    for line, _ in prose_lines(text + "\n"):
        stripped = line.strip()
        if stripped.startswith("|"):
            cells = [part.strip() for part in stripped.strip("|").split("|")]
            if table is None:
                table = Measured(title, about, command, cells, {})
            elif not set(stripped) <= set("|- :"):
                table.rows[cells[0]] = cells[1:]
            continue
        if table is not None:
            if part in MEASURED and table.head[0] in ("method", "way"):
                yield table
            table = None
        if line.startswith("## "):
            part, about = stripped[3:], ""
        elif line.startswith("### "):
            title, about = stripped[4:], ""
        elif line.startswith("    python "):
            command = stripped
        elif stripped:
            about = stripped


def ways() -> dict[str, str]:
    """The methods of the ways that benchmarks/forms.py compares."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from forms import ways as all_ways
    finally:
        sys.path.pop(0)
    return {way: method for way, (method, *_) in all_ways("128", 32, False).items()}


def figures(name: str) -> str:
    """The rows of a method in RESULTS.md, each table with its command; empty where none is."""
    known = ways()
    lines: list[str] = []
    command = ""
    for found in measured(RESULTS.read_text()):
        own = {
            row: cells
            for row, cells in found.rows.items()
            if known.get(row, row.partition(",")[0]) == name
        }
        if not own:
            continue
        if found.command != command:
            command = found.command
            lines.append(f"\n**{found.title}**\n\n```\n{command}\n```\n")
        lines.append(f"{found.about}\n")
        lines.append(table(found.head, [[row, *cells] for row, cells in own.items()]))
    if not lines:
        return "\nIt is in no table of [RESULTS.md](../../benchmarks/RESULTS.md) yet.\n"
    head = (
        f"\n### Figures of {name}\n\nFrom [RESULTS.md](../../benchmarks/RESULTS.md), which has the"
    )
    return f"{head}\nothers beside it and says what the columns mean.\n" + "\n".join(lines)
