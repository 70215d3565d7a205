"""Seconds of layers of other forms against dense ones, and against their share of operations.

    python benchmarks/form_speed.py [--outputs 2816] [--inputs 1024] [--dtype float32]

Prints a Markdown section. Layers are made of random weights by few rounds; one thread, each timing
the least of several within this run, as a ratio to that of the dense layer next to it.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from secateur.methods import method_class
from secateur.methods.form import Metric

TOKENS = (1, 128)
WAYS = (
    ("svd-llm", {}, 0.5),
    ("svd-llm", {}, 0.25),
    ("monarch", {}, 0.5),
    ("block-dense", {}, 0.5),
    ("block-shuffle", {}, 0.5),
    ("wanda", {"pattern": "2:4"}, 0.6),
    ("armor", {"rounds": 0}, 0.8),
    ("compot", {"sweeps": 1}, 0.5),
    ("ptqtp", {}, 0.5),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--outputs", type=int, default=2816)
    parser.add_argument("--inputs", type=int, default=1024)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    shape = arguments.outputs, arguments.inputs
    weight = torch.randn(*shape, dtype=torch.float64) / shape[1] ** 0.5
    metric = Metric.identity(shape[1], weight)
    dense = nn.Linear(arguments.inputs, arguments.outputs, bias=False, dtype=dtype)
    print(
        f"A layer of {shape[0]} × {shape[1]} in {arguments.dtype}, one thread. Time and\n"
        f"operations as shares of the dense layer's; below 1 is faster.\n"
    )
    print("| form | bytes | operations | " + " | ".join(f"{n} tokens" for n in TOKENS) + " |")
    print("|---" * (3 + len(TOKENS)) + "|")
    for name, options, share in WAYS:
        method = method_class(name)(**options)
        size, whole = dtype.itemsize, shape[0] * shape[1]
        forms = [f for f in method.forms(*shape, False) if f.bytes(size) <= share * whole * size]
        form = max(forms, key=lambda f: f.bytes(size))
        layer = method.layer(weight, metric, form, None, dtype)
        times = [ratio(dense, layer, n, dtype, arguments.repeats) for n in TOKENS]
        cells = " | ".join(f"{t:.2f}" for t in times)
        computed = " (dense weight)" if getattr(layer, "densified", False) else ""
        print(
            f"| {name}, {form.label}{computed} | {form.bytes(size) / whole / size:.2f} | "
            f"{form.multiplications / whole:.2f} | {cells} |"
        )


def ratio(
    dense: nn.Module, layer: nn.Module, tokens: int, dtype: torch.dtype, repeats: int
) -> float:
    """Time of a layer in that of the dense one, turn by turn."""
    x = torch.randn(tokens, dense.in_features).to(dtype)
    both = [timed(lambda m=m: m(x), repeats) for m in (dense, layer, dense, layer)]
    return min(both[1], both[3]) / min(both[0], both[2])


def timed(run: Callable[[], Tensor], repeats: int) -> float:
    with torch.inference_mode():
        run()
        found = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
    return min(found)


if __name__ == "__main__":
    main()
