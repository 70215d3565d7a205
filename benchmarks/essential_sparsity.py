"""Essential sparsity: how many of a model's smallest weights are not missed.

    python benchmarks/essential_sparsity.py MODEL HELD [--sparsities ...] [--floor 0]
        [--tolerance 0.01] [--rows FILE] [--plot FILE]

One threshold on |W| for the matrices of all blocks, in one shot, nothing is trained: the smallest
share p of them becomes zero, but for as many as every matrix keeps by its floor. The knee is the
largest p of the sweep up to which, there and at every smaller p, perplexity is at most the
tolerance above that of the dense model. Prints a Markdown section.

Source: Jaiswal et al., "The Emergence of Essential Sparsity in Large Pre-trained Models", arXiv
2306.03805, whose models are trained on afterwards; without that the knee comes earlier.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SPARSITIES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9)
LENGTH, WINDOWS = 256, 128
HALVINGS = 60
Row = dict[str, Any]


def main() -> None:
    arguments = parsed()
    rows = measured(arguments)
    print(section(arguments, rows))
    if arguments.plot:
        draw(arguments, rows)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("held")
    parser.add_argument("--sparsities", type=share, nargs="+", default=SPARSITIES)
    parser.add_argument("--floor", type=share, default=0.0, help="least share every matrix keeps")
    parser.add_argument("--tolerance", type=float, default=0.01)
    parser.add_argument("--windows", type=int, default=WINDOWS)
    parser.add_argument("--rows", type=Path, help="JSON lines to write")
    parser.add_argument("--plot", type=Path, help="picture to write (extra: benchmarks)")
    return parser.parse_args()


def share(text: str) -> float:
    number = float(text)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{text} should be at least 0 and below 1, e.g. 0.5")
    return number


def kept(matrices: Sequence[Tensor], sparsity: float, floor: float) -> list[int]:
    """How many of its largest weights every matrix keeps, given their |W|, ascending.

    max(floor, weights above one threshold), with the threshold at which the share p is gone.
    """
    total = sum(len(matrix) for matrix in matrices)
    least = [-int(-floor * len(matrix) // 1) for matrix in matrices]

    def at(threshold: float) -> list[int]:
        above = (len(m) - int(torch.searchsorted(m, threshold, right=True)) for m in matrices)
        return [max(own, n) for own, n in zip(least, above, strict=True)]

    low, high = -1.0, max(float(matrix[-1]) for matrix in matrices)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if sum(at(middle)) > round((1 - sparsity) * total) else (low, middle)
        )
    return at(high if sparsity else -1.0)


def measured(arguments: argparse.Namespace) -> list[Row]:
    from secateur import open_model
    from secateur.data.tokens import contiguous, read_documents, token_stream
    from secateur.evaluate.evaluator import quiet
    from secateur.evaluate.perplexity import perplexity

    quiet()
    model = open_model(arguments.model)
    stream = token_stream(read_documents(arguments.held), model.tokenizer)
    tokens = contiguous(stream, LENGTH, arguments.windows)
    weights = {
        f"layers.{block.index}.{linear.path}": linear.module.weight.data
        for block in model.blocks
        for linear in block.linear_layers
    }
    whole = {name: weight.clone() for name, weight in weights.items()}
    sizes = {name: weight.abs().double().flatten() for name, weight in whole.items()}
    order = {name: size.sort(descending=True, stable=True).indices for name, size in sizes.items()}
    ascending = [size.sort().values for size in sizes.values()]
    total = sum(map(len, ascending))
    rows: list[Row] = []
    for sparsity in sorted({0.0, *arguments.sparsities}):
        counts = kept(ascending, sparsity, arguments.floor)
        for (name, weight), count in zip(weights.items(), counts, strict=True):
            weight.copy_(whole[name])
            weight.view(-1)[order[name][count:]] = 0
        least, name = min(
            (count / len(own), name)
            for count, own, name in zip(counts, ascending, weights, strict=True)
        )
        found = perplexity(model.module, tokens)
        gone = 1 - sum(counts) / total
        row = {"sparsity": sparsity, "zeroed": gone, "perplexity": found}
        rows.append(row | {"thinnest": name, "thinnest_keeps": least})
        if arguments.rows:
            lines = [json.dumps(row) + "\n" for row in rows]
            arguments.rows.write_text("".join(lines))
    return rows


def knee(rows: Sequence[Row], tolerance: float) -> float:
    """The largest sparsity up to which no row is more than the tolerance worse than dense."""
    found = 0.0
    for row in rows:
        if not row["perplexity"] <= (1 + tolerance) * rows[0]["perplexity"]:
            break
        found = row["zeroed"]
    return found


def section(arguments: argparse.Namespace, rows: Sequence[Row]) -> str:
    dense = rows[0]["perplexity"]
    lines = [
        f"### Essential sparsity of {Path(arguments.model).name}",
        "",
        f"Smallest weights of all blocks zeroed in one shot by one threshold, floor "
        f"{arguments.floor:g}; perplexity on {Path(arguments.held).name}, {arguments.windows} "
        f"windows of {LENGTH} tokens.",
        "",
        "| zeroed | perplexity | worse by | thinnest matrix | keeps |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['zeroed']:.1%} | {row['perplexity']:.3f} | {row['perplexity'] / dense - 1:.1%}"
            f" | {row['thinnest']} | {row['thinnest_keeps']:.1%} |"
        )
    found = knee(rows, arguments.tolerance)
    return "\n".join(
        [*lines, "", f"Knee, at most {arguments.tolerance:.1%} worse: {found:.0%} of the weights."]
    )


def draw(arguments: argparse.Namespace, rows: Sequence[Row]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    axes.plot([row["zeroed"] for row in rows], [row["perplexity"] for row in rows], marker="o")
    found = knee(rows, arguments.tolerance)
    axes.axvline(found, linestyle="--", color="grey", label=f"knee, {found:.0%}")
    axes.axhline((1 + arguments.tolerance) * rows[0]["perplexity"], linestyle=":", color="grey")
    axes.set_yscale("log")
    axes.set_xlabel("share of weights zeroed")
    axes.set_ylabel("perplexity")
    axes.set_title(f"Essential sparsity of {Path(arguments.model).name}")
    axes.legend()
    figure.tight_layout()
    figure.savefig(arguments.plot, dpi=120)


if __name__ == "__main__":
    main()
