"""Perplexity against kept share: one calibration, every budget and temperature.

    python benchmarks/frontier.py MODEL CALIBRATION HELD [SECOND] [--seeds 0 1 2]

Appends nothing and prints a Markdown section; redirect it where it belongs.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

from secateur.allocate.base import Evidence
from secateur.apply import narrow_block
from secateur.calibration import Store, calibrate
from secateur.evaluate.judge import quiet
from secateur.evaluate.memory import peak_bytes
from secateur.evaluate.perplexity import perplexity
from secateur.methods.modegpt import MoDeGPT
from secateur.model import open_model
from secateur.plan import make_plan, measure_curves
from secateur.text import (
    Calibration,
    Tokens,
    calibration_tokens,
    contiguous,
    read_documents,
    token_stream,
)

KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5)
TEMPERATURES = (0.02, 0.03, 0.05, 0.1, 0.2, 1e6)
LENGTH, WINDOWS = 256, 128


def main() -> None:
    arguments = parsed()
    quiet()
    model = open_model(arguments.model)
    texts = {
        Path(source).name: contiguous(
            token_stream(read_documents(source), model.tokenizer), LENGTH, WINDOWS
        )
        for source in (arguments.held, arguments.second)
        if source
    }
    dense = {name: perplexity(model.module, tokens) for name, tokens in texts.items()}
    start, rows = time.perf_counter(), []
    for seed in arguments.seeds:
        for row in points(arguments, Calibration(arguments.calibration, 128, LENGTH, seed), texts):
            rows.append({"seed": seed, **row})
            print(rows[-1], file=sys.stderr, flush=True)
    print(section(arguments, dense, rows))
    seconds, memory = time.perf_counter() - start, peak_bytes(model.device)
    print(f"{seconds:.0f} s in all, peak memory of the process {memory / 1e9:.2f} GB.")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("held")
    parser.add_argument("second", nargs="?")
    parser.add_argument("--keeps", type=float, nargs="+", default=KEEPS)
    parser.add_argument("--temperatures", type=float, nargs="+", default=TEMPERATURES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--multiple-of", type=int, default=8)
    return parser.parse_args()


def points(
    arguments: argparse.Namespace, calibration: Calibration, texts: dict[str, Tokens]
) -> Iterator[dict[str, float]]:
    """One row per temperature and keep, from one set of statistics."""
    model, store = open_model(arguments.model), Store()
    tokens = calibration_tokens(calibration, model.tokenizer)
    method = MoDeGPT()
    calibrate(model, tokens, method.needs | method.allocator.needs, store)
    evidence: Evidence = measure_curves(model, method, store, arguments.multiple_of)
    for temperature in arguments.temperatures:
        for keep in arguments.keeps:
            method = MoDeGPT(keep=keep, temperature=temperature)
            small = open_model(arguments.model)
            multiple = arguments.multiple_of
            plan = make_plan(small, method, evidence, calibration, tokens, multiple)
            units = small.units(multiple)
            for block in small.blocks:
                own = [unit for unit in units if unit.block == block.index]
                statistics = store.get(block.index, method.needs, model.device)
                narrow_block(block, own, plan.sizes, method, statistics)
            values = {name: perplexity(small.module, t) for name, t in texts.items()}
            reached = plan.budget.reached
            yield {"temperature": temperature, "keep": keep, "reached": reached, **values}


def section(
    arguments: argparse.Namespace, dense: dict[str, float], rows: list[dict[str, float]]
) -> str:
    """A table per text: temperatures down, budgets across, means over seeds."""
    seeds = " ".join(map(str, arguments.seeds))
    lines = [
        f"### {Path(arguments.model).name}, `modegpt`",
        "",
        f"128 × {LENGTH} calibration tokens of `{Path(arguments.calibration).name}`, perplexity on "
        f"{WINDOWS} × {LENGTH} tokens, mean over seeds {seeds}; reached share in parentheses.",
    ]
    for name, value in dense.items():
        lines += ["", f"`{name}`, dense {value:.2f}:", ""]
        lines += ["| temperature | " + " | ".join(f"keep {k:g}" for k in arguments.keeps) + " |"]
        lines += ["|---" * (len(arguments.keeps) + 1) + "|"]
        for temperature in arguments.temperatures:
            cells = []
            for keep in arguments.keeps:
                same = [r for r in rows if (r["temperature"], r["keep"]) == (temperature, keep)]
                reached = mean(r["reached"] for r in same)
                cells.append(f"{mean(r[name] for r in same):.2f} ({reached:.3f})")
            label = "uniform" if temperature >= 1e6 else f"{temperature:g}"
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
