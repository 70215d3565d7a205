"""Compare several runs in one table, and find those that no other run dominates."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from secateur.report.report import perplexity, rise, size
from secateur.report.run_records import RATE, Run, read_run
from secateur.utils.errors import InputError
from secateur.utils.naming import short_name

#: costs that perplexity is compared against
AXES = ("bytes", "prefill_ms", "decode_ms")
TOLD = dict(zip(AXES, ("bytes", "prefill", "decode"), strict=True))
SAME = 0.005  # relative difference allowed between two perplexities of one model on one text
ALIKE = 0.15  # the same for its times, which other work on the machine disturbs
#: files that a sweep writes beside its runs: page, picture, table
SHEETS = ("frontier.html", "frontier.svg", "frontier.json")
Entry = dict[str, Any]


def compare(folders: Sequence[Path]) -> dict[str, Any]:
    """Compare runs of one dense model on one text, as plain data with their frontiers.

    Quality is the perplexity on the first text that all runs were evaluated on. A run is
    dominated on a cost if another run, or the dense model, is at least as good in that cost and
    in perplexity, and better in one of them.

    Raises:
        InputError: a folder holds no finished run, or the runs have different dense models or no
            text in common.
    """
    runs = [read_run(folder) for folder in folders]
    _check_model(runs)
    text, notes = _common_text(runs)
    names = _names([run.folder for run in runs])
    entries = [_entry(name, run, text) for name, run in zip(names, runs, strict=True)]
    dense = _dense(runs, text)
    for axis in AXES:
        there = [e for e in (dense, *entries) if e[axis] is not None]
        for entry in there:
            beaten = any(_beats(other, entry, axis) for other in there)
            entry["frontier"][axis] = not beaten
    notes += _notes(runs)
    return {
        "model": runs[0].report["model"],
        "text": text,
        "dense": dense,
        "runs": entries,
        "notes": notes,
    }


def _beats(a: Entry, b: Entry, axis: str) -> bool:
    one, other = ((float(e["perplexity"]), float(e[axis])) for e in (a, b))
    return one != other and one[0] <= other[0] and one[1] <= other[1]


def _check_model(runs: Sequence[Run]) -> None:
    """Check by the fingerprints of the weights that all runs have one dense model."""
    first = runs[0]
    for run in runs[1:]:
        a, b = (r.report["model"] for r in (first, run))
        if a["fingerprint"] != b["fingerprint"]:
            raise InputError(
                f"runs {str(first.folder)!r} and {str(run.folder)!r} have different dense "
                f"models: {a['source']!r} ({a['fingerprint'][:12]}) and {b['source']!r} "
                f"({b['fingerprint'][:12]}). Compare runs of one model."
            )


def _common_text(runs: Sequence[Run]) -> tuple[str, list[str]]:
    """The first text that all runs were evaluated on, and notes on texts that are left out.

    Raises:
        InputError: the runs have no text in common; the message names two that differ.
    """
    first, others = runs[0], runs[1:]
    texts = first.report["dense"]["perplexity"]
    if not texts:
        raise InputError(f"run {str(first.folder)!r} was evaluated on no text.")
    common = [name for name in texts if all(_same_text(first, run, name) for run in others)]
    if not common:
        name, run = next((n, r) for n in texts for r in others if not _same_text(first, r, n))
        there = ", ".join(map(repr, run.report["dense"]["perplexity"]))
        why = (
            f"has {there}" if name not in run.report["dense"]["perplexity"] else "has other tokens"
        )
        raise InputError(
            f"runs {str(first.folder)!r} and {str(run.folder)!r} were evaluated on different "
            f"texts: for {name!r} the second {why}. Repeat one with the --eval, --eval-length and "
            f"--eval-windows of the other."
        )
    left = [name for name in texts if name not in common]
    return common[0], [
        f"{name!r} is not compared: not all runs were evaluated on it" for name in left
    ]


def _same_text(a: Run, b: Run, name: str) -> bool:
    """Compare fingerprints of the tokens; in older reports, perplexities of the dense model."""
    one, other = a.report["dense"], b.report["dense"]
    if name not in other["perplexity"]:
        return False
    prints = one["texts"].get(name), other["texts"].get(name)
    if None not in prints:
        return bool(prints[0] == prints[1])
    same = math.isclose(one["perplexity"][name], other["perplexity"][name], rel_tol=SAME)
    return same and bool(one["tokens"].get(name) == other["tokens"].get(name))


def _names(folders: Sequence[Path]) -> list[str]:
    """The names of the folders, with as many parents as are needed to tell them apart."""
    whole = [folder.resolve() for folder in folders]
    if len(set(whole)) < len(whole):
        twice = next(folder for folder in whole if whole.count(folder) > 1)
        raise InputError(f"run {str(twice)!r} is given twice.")
    names = [folder.name for folder in whole]
    if len(set(names)) == len(names):
        return names
    shared = os.path.commonpath(whole)
    return [str(folder.relative_to(shared)) for folder in whole]


def _entry(name: str, run: Run, text: str) -> Entry:
    report, agrees = run.report, run.report["compressed"]["agreement"]
    first = next(iter(report["dense"]["perplexity"]))
    return {
        "name": name,
        "folder": str(run.folder),
        "method": report["method"]["name"],
        "allocator": report["allocator"] and report["allocator"]["name"],
        "budget": report["budget"],
        "tier": report["tier"],
        **_figures(report["compressed"], text),
        "top1_agreement": agrees.get("top1") if text == first else None,
        "kl_divergence": agrees.get("kl") if text == first else None,
    }


def _figures(side: dict[str, Any], text: str) -> Entry:
    """The figures of one model that are compared."""
    speed = side["speed"]
    amount = 1 if side["counts"] == "images" else speed.get("prompt_tokens", 1)
    read, write = (speed.get(f"{way}{RATE}") for way in ("prefill", "decode"))
    return {
        "parameters": side["parameters"],
        "bytes": side["bytes"],
        "perplexity": side["perplexity"][text],
        "prefill_ms": 1000 * amount / read if read else None,
        "decode_ms": 1000 / write if write else None,
        "peak_memory_bytes": side["peak_memory_bytes"],
        "frontier": {},
    }


def _dense(runs: Sequence[Run], text: str) -> Entry:
    """The dense model; its times are the median over all runs."""
    own = [_figures(run.report["dense"], text) for run in runs]
    for axis in ("prefill_ms", "decode_ms"):
        found = [entry[axis] for entry in own if entry[axis] is not None]
        own[0][axis] = median(found) if found else None
    return {"name": "dense", "method": None, **own[0]}


def _notes(runs: Sequence[Run]) -> list[str]:
    """Reasons why the times of the runs are hard to compare."""
    dense = [run.report["dense"]["speed"] for run in runs]
    found = []
    lengths = {speed["prompt_tokens"] for speed in dense if "prompt_tokens" in speed}
    if len(lengths) > 1:
        told = ", ".join(f"{n:g}" for n in sorted(lengths))
        found.append(f"prefill was timed on prompts of different lengths: {told} tokens")
    for phase in ("prefill", "decode"):
        rates = [s[f"{phase}{RATE}"] for s in dense if f"{phase}{RATE}" in s]
        if rates and max(rates) > (1 + ALIKE) * min(rates):
            found.append(
                f"{phase}: the dense model was {max(rates) / min(rates):.2f} times as fast in one "
                f"run as in another, so the times of these runs are hard to compare"
            )
    if any(not speed for speed in dense) and any(dense):
        found.append("some runs were not timed; the frontiers of time leave them out")
    return found


def show(content: dict[str, Any]) -> None:
    """Print the result of :func:`compare`, one line per run, largest first."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    from secateur.report.console import terminal

    console = terminal()
    table = Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for column in (
        "run",
        "method",
        "bytes",
        "",
        "perplexity",
        "",
        "prefill",
        "decode",
        "dominated on",
    ):
        left = column in ("run", "method", "dominated on")
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    dense = content["dense"]
    for entry in sorted((dense, *content["runs"]), key=lambda e: -e["bytes"]):
        own = entry is not dense
        beaten = [TOLD[axis] for axis in AXES if entry["frontier"].get(axis) is False]
        everywhere = len(beaten) == len(entry["frontier"]) > 0
        cells = (
            escape(entry["name"]),
            escape(entry["method"] or ""),
            size(entry["bytes"]),
            f"{entry['bytes'] / dense['bytes']:.0%}" if own else "",
            perplexity(entry["perplexity"]),
            rise(entry["perplexity"], dense["perplexity"]) if own else "",
            *(_told_ms(entry[axis]) for axis in AXES[1:]),
            "everything" if everywhere and len(beaten) > 1 else ", ".join(beaten),
        )
        table.add_row(*cells, style="dim" if everywhere else None)
    console.print(table)
    model = escape(short_name(content["model"]["source"]))
    console.print(
        f"{model}, perplexity on {escape(content['text'])}; prefill of one prompt and decode of "
        f"one token, in ms. A run is dominated on a cost if another one is as good in that cost "
        f"and in perplexity, and better in one of them."
    )
    for note in content["notes"]:
        console.print(f"note: {escape(note)}")


def _told_ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3g} ms"
