"""Seconds and peak memory of a compression against blocks, MLP width and tokens.

    python benchmarks/scale.py [--method modegpt] [--threads 2] [--rows FILE]
    python benchmarks/scale.py --gpu [--device cuda]

Prints a Markdown section. Llamas of random weights are written to a folder, one after the other,
and each is compressed in a fresh process. From one shape blocks, width and tokens are varied one at
a time; the exponent of each is the slope of a least squares line through the logarithms. The
compression is calibrate, curves, allocate and apply of report.json: all between the open model and
the narrowed one. With --gpu one model of the shape of a Llama of 7 billion parameters is compressed
on 128 × 2048 tokens. Beside each stage stands its floor (docs/performance.md) at the rates of a
large matrix product and a large copy, measured in the same process. On a busy machine take one
thread and --clock cpu.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rows import Row, gathered, tell

STAGES = ("calibrate", "curves", "allocate", "apply")
SHOWN = ("calibration_forward", *STAGES, "open", "save", "evaluate", "total")
TARGET, FROM = 3, 4096  # the most of the forward pass wanted, from this width on
SEVEN = {"blocks": 32, "hidden": 4096, "mlp": 11008, "heads": 32, "kv_heads": 32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", default="modegpt", choices=("modegpt", "auto"))
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 4, 8], help="first: the base")
    parser.add_argument("--widths", type=int, nargs="+", default=[4096, 1024, 2048, 5632])
    parser.add_argument("--samples", type=int, nargs="+", default=[128, 32, 64])
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--gpu", action="store_true", help="the shape of a 7B model instead")
    parser.add_argument("--stream", default="auto", choices=("auto", "on", "off"))
    parser.add_argument("--folder", type=Path, help="for the models  [default: a temporary one]")
    parser.add_argument("--rows", type=Path, help="JSON lines; measured rows are added")
    parser.add_argument("--kept", action="store_true", help="measure nothing that FILE lacks")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.gpu and arguments.device == "cpu":
        arguments.device = "cuda"
    if arguments.worker:
        tell([measured(arguments, arguments.worker)])
        return
    jobs = wanted(arguments)
    rows = gathered(arguments, jobs)
    found = [next(row for row in rows if job.items() <= row.items()) for job in jobs]
    print(opening(arguments, found[0]))
    if not arguments.gpu:
        print(table(found))
        if len(found) > 1:
            print(exponents(found, jobs[0]))
    print(distances(found[0], arguments.keep))


def wanted(arguments: argparse.Namespace) -> list[Row]:
    """What to measure: the base, and from it one thing at a time."""
    more = {
        "method": arguments.method,
        "length": arguments.length,
        "device": arguments.device,
        "stream": arguments.stream,
        "clock": arguments.clock,
        "threads": arguments.threads,
        "keep": arguments.keep,
    }
    if arguments.gpu:
        return [{**SEVEN, **more, "vocabulary": 32000, "length": 2048, "samples": 128}]
    heads = max(1, arguments.hidden // 128)
    base = {
        "blocks": arguments.blocks[0],
        "hidden": arguments.hidden,
        "mlp": arguments.widths[0],
        "heads": heads,
        "kv_heads": heads,
        "vocabulary": arguments.vocabulary,
        "samples": arguments.samples[0],
    }
    varied = {"blocks": arguments.blocks, "mlp": arguments.widths, "samples": arguments.samples}
    others = [base | {name: value} for name, own in varied.items() for value in own[1:]]
    return [{**job, **more} for job in (base, *others)]


def measured(arguments: argparse.Namespace, job: Row) -> Row:
    """One compression in this process; imports come late, so that help is quick."""
    import torch
    from floors import Shape
    from random_model import write_model, write_text

    import secateur
    from secateur.evaluate.evaluator import quiet
    from secateur.evaluate.measurements import Questions
    from secateur.evaluate.memory import peak_bytes
    from secateur.methods import method_class

    quiet()
    torch.set_num_threads(arguments.threads)
    if arguments.clock == "cpu":
        time.perf_counter = time.process_time  # what stages are timed by
    shape = Shape(**{name: job[name] for name in Shape.__dataclass_fields__})
    device = torch.device(job["device"])
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        os.environ["XDG_CACHE_HOME"] = place  # nothing is known from before
        folder, text = Path(place, "model"), Path(place, "text.txt")
        write_model(folder, shape, job["device"])
        write_text(text, shape.tokens)
        rates = speeds(device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        marks = Path("/proc/self/clear_refs")
        if marks.exists():
            marks.write_text("5")  # forgets the peak of what came before
        report = secateur.compress(
            folder,
            Path(place, "out"),
            method_class(job["method"])(),
            secateur.Budget(keep=job["keep"]),
            calibration=secateur.Calibration(str(text), samples=shape.samples, length=shape.length),
            questions=Questions((), speed=False),
            settings=secateur.Settings(device=job["device"], stream=job["stream"]),
        )
        peak = peak_bytes(torch.device("cpu"))
        on_gpu = peak_bytes(device) if device.type == "cuda" else 0
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    seconds = report.content["seconds"]
    return {
        **job,
        "seconds": seconds,
        "rates": rates,
        "peak": peak,
        "peak_gpu": on_gpu,
        "peak_reload": children,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "",
        "shape": asdict(shape),
    }


def speeds(device: Any) -> dict[str, float]:
    """Operations a second of large products in the model's format and float64; bytes of a copy."""
    import torch

    size = 8192 if device.type == "cuda" else 2048
    own = torch.bfloat16 if device.type == "cuda" else torch.float32

    def best(work: Callable[[], Any]) -> float:
        times = []
        for _ in range(4):
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
        return min(times)

    rates = {}
    for name, dtype in (("model", own), ("double", torch.float64)):
        square = torch.randn(size, size, device=device, dtype=torch.float32).to(dtype)
        rates[name] = 2 * size**3 / best(lambda square=square: square @ square)
    line = torch.zeros(2**28 if device.type == "cuda" else 2**26, device=device)
    rates["bytes"] = 2 * line.nbytes / best(line.clone)
    return rates


def compression(row: Row) -> float:
    return float(sum(row["seconds"][stage] for stage in STAGES))


def ratio(row: Row) -> float:
    return compression(row) / float(row["seconds"]["calibration_forward"])


def opening(arguments: argparse.Namespace, base: Row) -> str:
    """What was run."""
    at = f"`{arguments.method}` at keep {arguments.keep:g}, on " + (
        base["gpu"] or f"a CPU, threads: {base['threads']}, {base['clock']} clock"
    )
    shape = f"hidden size {base['hidden']}, {base['heads']} heads, vocabulary {base['vocabulary']}"
    return (
        f"{at}.\nLlamas of random weights in bfloat16, {shape}; windows of {base['length']} tokens."
        f"\nWanted is a compression of at most {TARGET} calibration forward passes at MLP widths "
        f"from {FROM} on.\n"
    )


def table(rows: Sequence[Row]) -> str:
    names = ("forward", *STAGES, "ratio", "peak, GB", "reload, GB")
    lines = [
        "| blocks | MLP | tokens | " + " | ".join(names) + " |",
        "|" + "---|" * (3 + len(names)),
    ]
    for row in rows:
        seconds = row["seconds"]
        cells = [str(row["blocks"]), str(row["mlp"]), str(row["samples"] * row["length"])]
        cells += [f"{seconds[s]:.1f}" for s in ("calibration_forward", *STAGES)]
        cells += [
            f"{ratio(row):.2f}",
            f"{row['peak'] / 1e9:.2f}",
            f"{row['peak_reload'] / 1e9:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def exponents(rows: Sequence[Row], base: Row) -> str:
    """Slopes through the logarithms of what was measured while one thing varied."""
    figures: tuple[tuple[str, Callable[[Row], float]], ...] = (
        ("forward pass", lambda row: row["seconds"]["calibration_forward"]),
        *(
            (stage, lambda row, s=stage: row["seconds"][s])
            for stage in STAGES
            if stage != "allocate"
        ),
        ("compression", compression),
        ("peak memory", lambda row: row["peak"]),
    )
    lines = ["| grows with | " + " | ".join(name for name, _ in figures) + " |"]
    lines.append("|" + "---|" * (1 + len(figures)))
    for name, shown in (("blocks", "blocks"), ("mlp", "MLP width"), ("samples", "tokens")):
        own = [r for r in rows if all(r[k] == v for k, v in base.items() if k != name)]
        if len(own) < 2:
            continue
        along = np.log([row[name] for row in own])
        slopes = [
            np.polyfit(along, np.log([max(1e-3, of(r)) for r in own]), 1)[0] for _, of in figures
        ]
        lines.append(f"| {shown} | " + " | ".join(f"{slope:.2f}" for slope in slopes) + " |")
    return "Exponents:\n\n" + "\n".join(lines) + "\n"


def distances(row: Row, keep: float) -> str:
    """Each stage of a run beside its floor."""
    from floors import Shape, floors

    rates = row["rates"]
    itemsize = 2 if row["device"] != "cpu" else 4
    least = floors(Shape(**row["shape"]), row["method"], keep, itemsize)
    lines = [
        f"Blocks: {row['blocks']}, MLP {row['mlp']}, {row['samples'] * row['length']} tokens, and "
        f"the floor at {rates['model'] / 1e9:.0f}\nand (float64) {rates['double'] / 1e9:.0f} "
        f"billion operations and {rates['bytes'] / 1e9:.1f} GB a second:\n",
        "| stage | seconds | operations | in float64 | GB | floor, seconds | times the floor |",
        "|---|---|---|---|---|---|---|",
    ]
    for stage in SHOWN:
        seconds = row["seconds"].get(stage, 0.0)
        if stage not in least:
            lines.append(f"| {stage} | {seconds:.1f} | | | | | |")
            continue
        work = least[stage]
        floor = work.seconds(rates)
        lines.append(
            f"| {stage} | {seconds:.1f} | {work.model:.1e} | {work.double:.1e} | "
            f"{work.bytes / 1e9:.1f} | {floor:.1f} | {seconds / floor:.1f} |"
        )
    found = f"\nCompression: {compression(row):.1f} s, {ratio(row):.2f} calibration forward passes"
    return (
        "\n".join(lines)
        + f"\n{found}; peak {row['peak'] / 1e9:.2f} GB"
        + (f", on the GPU {row['peak_gpu'] / 1e9:.2f} GB." if row["peak_gpu"] else ".")
    )


if __name__ == "__main__":
    main()
