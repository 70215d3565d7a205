"""Perplexity against bytes: every form of matrices, and mixes of them.

    python benchmarks/forms.py MODEL CALIBRATION HELD [--group 128,64] [--rows FILE] [--plot FILE]

Prints a Markdown section. The model is taken as stored in bfloat16, so that four bits are a quarter
of it. Bytes are those of all blocks on disk, as a share of the dense ones. Each way is measured in
a process of its own; rows that FILE already holds are not measured again.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rows import Row, add_flags, gathered, tell

LENGTH, WINDOWS = 256, 128
KEEPS = (0.75, 0.5, 0.375)
MIXED = (0.36, 0.28, 0.22)  # of the bytes; below an integer form of four bits in the last two


def ways(
    group: str, block: int, light: bool
) -> dict[str, tuple[str, dict[str, Any], tuple[float, ...]]]:
    """Title → method, options, budgets; 0 for the smallest form everywhere.

    Light: few rounds and one size for the solvers that take hours.
    """
    integers = {"group": group}
    few, keeps = ({"grain": 2, "sweeps": 3}, (0.5,)) if light else ({}, KEEPS)
    return {
        "int8, gptq": ("gptq", {"bits": "8", **integers}, (0,)),
        "int4-g128, gptq": ("gptq", {"bits": "4", **integers}, (0,)),
        "int4-g128, rtn": ("rtn", {"bits": "4", **integers}, (0,)),
        "int3-g128, gptq": ("gptq", {"bits": "3", **integers}, (0,)),
        "ptqtp": ("ptqtp", {"groups": group.replace("0,", "")}, (0,)),
        "svd": ("svd", {}, KEEPS),
        "svd-llm": ("svd-llm", {}, KEEPS),
        "welore": ("welore", {}, KEEPS),
        "monarch": ("monarch", {}, KEEPS),
        "block-dense": ("block-dense", {}, KEEPS),
        "block-shuffle": ("block-shuffle", {}, KEEPS),
        "magnitude": ("magnitude", {"floor": 0.1}, KEEPS),
        "wanda": ("wanda", {"floor": 0.1}, KEEPS),
        "sparsegpt": ("sparsegpt", {"floor": 0.1}, KEEPS),
        "wanda 2:4": ("wanda", {"pattern": "2:4"}, (0,)),
        "sparsegpt 2:4": ("sparsegpt", {"pattern": "2:4"}, (0,)),
        "armor": ("armor", {"block": block} | ({"rounds": 20} if light else {}), (0,)),
        "compot": ("compot", {}, KEEPS),
        "cospadi": ("cospadi", few, keeps),
        "cospadi, shared": ("cospadi", {**few, "share": 1}, keeps),
        "dsformer": ("dsformer", few, keeps),
        "mix: integers": ("forms", {"of": "gptq"}, MIXED),
        "mix: all forms": ("forms", {"of": "gptq,ptqtp,sparsegpt,svd-llm"}, MIXED),
        "mix: auto, then int4": ("recipe", {}, (0.22, 0.18, 0.14)),
    }


def main() -> None:
    arguments = parsed()
    if arguments.worker:
        tell(measured(arguments, arguments.worker["way"]))
        return
    names = arguments.only or ["dense", *ways(arguments.group, arguments.block, arguments.light)]
    rows = gathered(arguments, [{"way": name} for name in names])
    print(section(arguments, rows))
    if arguments.plot:
        draw(arguments, rows)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("held")
    parser.add_argument(
        "--group", default="128,64", help="integers' groups, the first that divides"
    )
    parser.add_argument("--block", type=int, default=32, help="of ARMOR's wrappers")
    parser.add_argument(
        "--light", action="store_true", help="few rounds, one size of ARMOR, CoSpaDi and DSFormer"
    )
    parser.add_argument("--only", nargs="+", help="ways to measure")
    add_flags(parser)
    return parser.parse_args()


def measured(arguments: argparse.Namespace, name: str) -> Iterator[Row]:
    """One row a budget; statistics and scores are shared between budgets."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from secateur.evaluate.evaluator import quiet

    quiet()
    with tempfile.TemporaryDirectory() as folder:
        dense = str(Path(folder, "dense"))
        half = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16)
        half.save_pretrained(dense)
        AutoTokenizer.from_pretrained(arguments.model).save_pretrained(dense)
        if name == "dense":
            yield {"way": name, "reached": 1.0, "perplexity": judged(arguments, dense)}
            return
        method, options, keeps = ways(arguments.group, arguments.block, arguments.light)[name]
        if method == "recipe":
            for keep in keeps:
                yield followed(arguments, dense, Path(folder, "out"), name, keep)
            return
        yield from reshaped(arguments, dense, name, method, options, keeps)


def judged(arguments: argparse.Namespace, source: str) -> float:
    from secateur import open_model

    return perplexity_of(arguments, open_model(source))


def perplexity_of(arguments: argparse.Namespace, model: Any) -> float:
    from secateur.data.tokens import contiguous, read_documents, token_stream
    from secateur.evaluate.perplexity import perplexity

    ids = token_stream(read_documents(arguments.held), model.tokenizer)
    return perplexity(model.module, contiguous(ids, LENGTH, WINDOWS))


def reshaped(
    arguments: argparse.Namespace,
    dense: str,
    name: str,
    method: str,
    options: dict[str, Any],
    keeps: tuple[float, ...],
) -> Iterator[Row]:
    from secateur import (
        Budget,
        Calibration,
        InputError,
        Store,
        calibrate,
        calibration_tokens,
        make_plan,
        open_model,
        score,
    )
    from secateur.apply.sequential import narrow_blocks
    from secateur.methods import method_class

    kind, model = method_class(method), open_model(dense)
    calibration = Calibration(arguments.calibration, 128, LENGTH, 0)
    tokens = calibration_tokens(calibration, model.tokenizer)
    own, start, store = kind(**options), time.perf_counter(), Store()
    calibrate(model, tokens, own.needs | own.allocator.needs, store)
    evidence = score(model, own, store, tokens)
    before = time.perf_counter() - start
    for keep in keeps:
        small, chosen = open_model(dense), kind(**options)
        budget = Budget(keep=keep or "least")
        start = time.perf_counter()
        try:
            plan = make_plan(
                small, chosen, evidence, calibration, tokens, budget=budget, store=store
            )
        except InputError as error:  # out of its reach
            print(f"{name}, keep {keep:g}: {error}", file=sys.stderr)
            continue
        given = (chosen.units(small, 8), plan.sizes)
        list(narrow_blocks(small, chosen, *given, tokens=tokens, store=store))
        seconds = before + time.perf_counter() - start
        found = perplexity_of(arguments, small)
        yield {
            "way": name,
            "keep": keep,
            "reached": plan.budget.reached,
            "perplexity": found,
            "seconds": seconds,
        }


def followed(arguments: argparse.Namespace, dense: str, out: Path, name: str, keep: float) -> Row:
    """Widths by the default method, then integers of four bits."""
    from secateur import GPTQ, Auto, Budget, Calibration, Questions, Recipe, Step, compress

    grain = int(arguments.group.split(",")[-1])
    groups = f"0,16,32,{arguments.group}"
    steps = (
        Step.of(Auto(), Budget(multiple_of=grain)),
        Step.of(GPTQ(bits="4", group=groups)),
    )
    start = time.perf_counter()
    report = compress(
        dense,
        out,
        Recipe(steps, keep),
        calibration=Calibration(arguments.calibration, 128, LENGTH, 0),
        questions=Questions((), speed=False),
        overwrite=True,
    )
    seconds = time.perf_counter() - start
    return {
        "way": name,
        "keep": keep,
        "reached": report["budget"]["reached"],
        "perplexity": judged(arguments, str(out)),
        "seconds": seconds,
    }


def section(arguments: argparse.Namespace, rows: list[Row]) -> str:
    """One table by way, and one that holds mixes against the best single form of their bytes."""
    dense = next(row["perplexity"] for row in rows if row["way"] == "dense")
    lines = [
        f"### {Path(arguments.model).name}",
        "",
        f"128 × {LENGTH} calibration tokens of `{Path(arguments.calibration).name}`, perplexity on "
        f"{WINDOWS} × {LENGTH} tokens of `{Path(arguments.held).name}`, one seed; dense in "
        f"bfloat16 {dense:.2f}. Share of the bytes of all blocks → perplexity, and seconds"
        + (". ARMOR, CoSpaDi and DSFormer with few rounds." if arguments.light else "."),
        "",
        "| way | share → perplexity | seconds |",
        "|---|---|---|",
    ]
    for name in ways(arguments.group, arguments.block, arguments.light):
        own = [row for row in rows if row["way"] == name]
        if not own:
            continue
        cells = "; ".join(f"{row['reached']:.3f} → {row['perplexity']:.2f}" for row in own)
        seconds = ", ".join(f"{row['seconds']:.0f}" for row in own)
        lines.append(f"| {name} | {cells} | {seconds} |")
    single = [r for r in rows if r["way"] != "dense" and not r["way"].startswith("mix")]
    lines += [
        "",
        "| mix | share | perplexity | best single form within that share |",
        "|---" * 4 + "|",
    ]
    for row in (row for row in rows if row["way"].startswith("mix")):
        within = [one for one in single if one["reached"] <= row["reached"] + 1e-3]
        best = min(within, key=lambda one: one["perplexity"], default=None)
        beside = (
            "none so small"
            if best is None
            else (f"{best['way']}, {best['reached']:.3f} → {best['perplexity']:.2f}")
        )
        lines.append(
            f"| {row['way']} | {row['reached']:.3f} | {row['perplexity']:.2f} | {beside} |"
        )
    return "\n".join(lines) + "\n"


def draw(arguments: argparse.Namespace, rows: list[Row]) -> None:
    """Perplexity against the share of the bytes, a line a way."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panel = plt.subplots(figsize=(11, 6), layout="constrained")
    for index, name in enumerate(dict.fromkeys(r["way"] for r in rows if r["way"] != "dense")):
        own = sorted((r for r in rows if r["way"] == name), key=lambda r: r["reached"])
        style = {"linewidth": 2.5} if name.startswith("mix") else {"linewidth": 1.0}
        marker = "os^vDP*Xp<>hd8HsPos^vDP"[index % 23]
        x, y = [r["reached"] for r in own], [r["perplexity"] for r in own]
        panel.plot(x, y, marker=marker, markersize=5, label=name, **style)
    dense = next(row["perplexity"] for row in rows if row["way"] == "dense")
    panel.axhline(dense, color="black", linestyle=":", label="dense")
    panel.set(xlabel="share of the bytes of all blocks, of bfloat16", ylabel="perplexity")
    panel.set_yscale("log")
    panel.set_ylim(top=30 * dense)
    panel.grid(alpha=0.3, which="both")
    panel.invert_xaxis()
    panel.set_title(Path(arguments.model).name)
    figure.legend(loc="outside right upper")
    figure.savefig(arguments.plot, dpi=110)


if __name__ == "__main__":
    main()
