"""Perplexity against kept share: every method, every budget, several seeds.

    python benchmarks/frontier.py MODEL CALIBRATION HELD SECOND [--seeds 0 1 2] [--rows FILE]
        [--plot FILE]

Prints a Markdown section. Each method and seed is measured in a process of its own, so that its
peak memory is its own. Rows that FILE already holds are not measured again. Where an allocation has
a temperature, it is run at several and counted at the one that is best on HELD, budget by budget.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from rows import Row, add_flags, gathered, tell

from secateur.methods import METHODS, method_class
from secateur.structure.units import MATRICES

KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5)
TEMPERATURES = (0.02, 0.05, 0.1, 0.2)
LENGTH, WINDOWS = 256, 128
BASELINE = "modegpt"
NARROWING = [name for name in METHODS if method_class(name).kinds != MATRICES]
NAMES = (*NARROWING, "modegpt, knapsack", "modegpt, uniform")  # after a comma, another allocator
MARKERS = "os^vDP*Xp<>hd8HsP"


def main() -> None:
    arguments = parsed()
    if arguments.worker:
        tell(measured(arguments, arguments.worker["method"], arguments.worker["seed"]))
        return
    names = ("dense", *arguments.methods)
    jobs = [{"method": name, "seed": seed} for seed in arguments.seeds for name in names]
    rows = gathered(arguments, jobs)
    measured_names = {row["method"] for row in rows}
    arguments.methods = [name for name in arguments.methods if name in measured_names]
    print(section(arguments, rows))
    if arguments.plot:
        draw(arguments, rows)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("held")
    parser.add_argument("second")
    parser.add_argument("--keeps", type=float, nargs="+", default=KEEPS)
    parser.add_argument("--temperatures", type=float, nargs="+", default=TEMPERATURES)
    parser.add_argument("--methods", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--multiple-of", type=int, default=8)
    add_flags(parser)
    return parser.parse_args()


def measured(arguments: argparse.Namespace, name: str, seed: int) -> Iterator[Row]:
    """One row a budget and temperature; statistics and scores are shared between budgets."""
    from secateur import (
        Budget,
        Calibration,
        InputError,
        Step,
        Store,
        calibrate,
        calibration_tokens,
        make_plan,
        open_model,
        score,
    )
    from secateur.allocate import allocator_class
    from secateur.allocate.base import Allocator
    from secateur.allocate.influence import EntropicInfluence
    from secateur.apply.sequential import narrow_blocks
    from secateur.data.tokens import contiguous, read_documents, token_stream
    from secateur.evaluate.evaluator import quiet
    from secateur.evaluate.memory import peak_bytes
    from secateur.evaluate.perplexity import perplexity

    quiet()
    model = open_model(arguments.model)
    texts = {
        Path(source).name: contiguous(
            token_stream(read_documents(source), model.tokenizer), LENGTH, WINDOWS
        )
        for source in (arguments.held, arguments.second)
    }

    def judged(small: Any) -> dict[str, float]:
        return {name: perplexity(small.module, tokens) for name, tokens in texts.items()}

    if name == "dense":
        yield {"method": name, "seed": seed, "perplexity": judged(model)}
        return
    title, _, other = name.partition(", ")
    kind = method_class(title)
    allocators: list[Allocator] = [allocator_class(other)() if other else kind().allocator]
    if isinstance(allocators[0], EntropicInfluence):
        allocators = [EntropicInfluence(t) for t in arguments.temperatures]
    calibration = Calibration(arguments.calibration, 128, LENGTH, seed)
    tokens = calibration_tokens(calibration, model.tokenizer)
    start, store = time.perf_counter(), Store()
    calibrate(model, tokens, kind().needs | allocators[0].needs, store)
    evidence = score(model, kind(), store, tokens, allocators[0])
    before = time.perf_counter() - start
    for keep in arguments.keeps:
        for allocator in allocators:
            small, method = open_model(arguments.model), kind()
            budget = Budget(keep=keep, multiple_of=arguments.multiple_of)
            start = time.perf_counter()
            try:
                plan = make_plan(
                    small,
                    method,
                    evidence,
                    calibration,
                    tokens,
                    budget=budget,
                    allocator=allocator,
                    store=store,
                )
            except InputError as error:  # out of its reach
                print(f"{name}, keep {keep:g}: {error}", file=sys.stderr)
                continue
            units = Step.of(method, budget, allocator).units(small)
            given = {"tokens": tokens, "store": store}
            list(narrow_blocks(small, method, units, plan.sizes, **given))
            seconds = before + time.perf_counter() - start
            yield {
                "method": name,
                "seed": seed,
                "keep": keep,
                "temperature": getattr(allocator, "temperature", None),
                "reached": plan.budget.reached,
                "perplexity": judged(small),
                "seconds": seconds,
                "peak_bytes": peak_bytes(model.device),
            }


def best(arguments: argparse.Namespace, rows: list[Row], name: str, keep: float) -> list[Row]:
    """The rows of a method at a budget, at the temperature that is best on the held-out text."""
    own = [row for row in rows if row["method"] == name and row["keep"] == keep]
    held = Path(arguments.held).name
    groups = {
        t: [row for row in own if row["temperature"] == t] for t in {r["temperature"] for r in own}
    }
    by_mean = lambda group: mean(row["perplexity"][held] for row in group)  # noqa: E731
    return min(groups.values(), key=by_mean, default=[])


def excess(arguments: argparse.Namespace, rows: list[Row], name: str, keep: float) -> float:
    """Mean ln(perplexity / dense perplexity) on the held-out text."""
    held = Path(arguments.held).name
    dense = next(row["perplexity"][held] for row in rows if row["method"] == "dense")
    own = best(arguments, rows, name, keep)
    return mean(math.log(r["perplexity"][held] / dense) for r in own) if own else math.nan


def section(arguments: argparse.Namespace, rows: list[Row]) -> str:
    """A table a text, methods down and budgets across, and what each costs."""
    seeds, keeps = " ".join(map(str, arguments.seeds)), arguments.keeps
    lines = [
        f"### {Path(arguments.model).name}",
        "",
        f"128 × {LENGTH} calibration tokens of `{Path(arguments.calibration).name}`, perplexity on "
        f"{WINDOWS} × {LENGTH} tokens, mean over seeds {seeds} with the range in parentheses.",
    ]
    head = ["| method | " + " | ".join(f"keep {k:g}" for k in keeps) + " |"]
    head += ["|---" * (len(keeps) + 1) + "|"]
    for source in (arguments.held, arguments.second):
        text = Path(source).name
        dense = next(row["perplexity"][text] for row in rows if row["method"] == "dense")
        lines += ["", f"`{text}`, dense {dense:.2f}:", "", *head]
        for name in arguments.methods:
            cells = []
            for keep in keeps:
                found = [r["perplexity"][text] for r in best(arguments, rows, name, keep)]
                told = f"{mean(found):.2f}" if found else "–"
                several = f" ({min(found):.2f}–{max(found):.2f})" if len(found) > 1 else ""
                cells.append(told + several)
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", f"ln(perplexity / dense) on `{Path(arguments.held).name}`", "", *head]
    for name in arguments.methods:
        found = [excess(arguments, rows, name, keep) for keep in keeps]
        lines.append(f"| {name} | " + " | ".join(f"{x:.3f}" for x in found) + " |")
    if {"auto", BASELINE} <= set(arguments.methods):
        ratios = [
            excess(arguments, rows, "auto", k) / excess(arguments, rows, BASELINE, k) for k in keeps
        ]
        cells = " | ".join(f"{x:.2f}" for x in ratios)
        lines.append(f"| **auto, as a share of {BASELINE}** | {cells} |")
    head = "| method | seeds | temperatures | reached | seconds | peak memory |"
    lines += ["", head, "|---" * 6 + "|"]
    for name in arguments.methods:
        own = [group for keep in keeps if (group := best(arguments, rows, name, keep))]
        seen = " ".join(map(str, sorted({row["seed"] for group in own for row in group})))
        warm = ", ".join(f"{g[0]['temperature']:g}" for g in own if g[0]["temperature"])
        reached = ", ".join(f"{mean(r['reached'] for r in g):.3f}" for g in own)
        seconds = ", ".join(f"{mean(r['seconds'] for r in g):.0f}" for g in own)
        memory = max(row["peak_bytes"] for group in own for row in group)
        lines.append(
            f"| {name} | {seen} | {warm or '–'} | {reached} | {seconds} | {memory / 1e9:.2f} GB |"
        )
    return "\n".join(lines) + "\n"


def draw(arguments: argparse.Namespace, rows: list[Row]) -> None:
    """Perplexity against kept share, a line a method, a panel a text."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    for panel, source in zip(panels, (arguments.held, arguments.second), strict=True):
        text = Path(source).name
        dense = next(row["perplexity"][text] for row in rows if row["method"] == "dense")
        for name, marker in zip(arguments.methods, MARKERS, strict=False):
            groups = [g for keep in arguments.keeps if (g := best(arguments, rows, name, keep))]
            x = [mean(r["reached"] for r in g) for g in groups]
            y = [mean(r["perplexity"][text] for r in g) for g in groups]
            width = 2.5 if name == "auto" else 1.0
            panel.plot(x, y, marker=marker, markersize=4, linewidth=width, label=name)
        panel.axhline(dense, color="black", linestyle=":", label="dense")
        panel.set(xlabel="kept share of block parameters", ylabel="perplexity", title=text)
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        panel.yaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
        panel.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        panel.grid(alpha=0.3, which="both")
        panel.invert_xaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    figure.suptitle(Path(arguments.model).name)
    figure.savefig(arguments.plot, dpi=110)


if __name__ == "__main__":
    main()
