"""A model larger than the memory it is compressed in.

    python benchmarks/large.py FOLDER [--blocks 54] [--memory 2.5]

Writes a Llama of random weights to FOLDER block by block (by default about two billion parameters,
4 GB in bfloat16), compresses it in processes that may hold no more than so many GB each, prints a
row of figures and removes both. Several numbers of blocks, as "4,8,16", give a row each. What a
process holds is limited by RLIMIT_DATA, also of the one that judges. Printed are the greatest
resident size of the first, mapped code of libraries included, and what judging takes beside them.
"Times forward" is the compression by the calibration's forward pass, which is short here.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from floors import Shape
from random_model import write_model

WATCHED = """
import atexit, sys
from secateur.__main__ import main
from secateur.evaluate.memory import peak_bytes
import torch
atexit.register(lambda: print("PEAK", peak_bytes(torch.device("cpu")), file=sys.stderr))
main()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", default="54")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--mlp", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--memory", type=float, default=2.5, help="GB; 0 sets no limit")
    parser.add_argument("--method", default="modegpt")
    parser.add_argument("--keep", type=float, default=0.8)
    arguments = parser.parse_args()
    print("| blocks | parameters | GB | peak, GB | judging, GB | seconds | times forward |")
    print("|---|---|---|---|---|---|---|")
    for blocks in map(int, arguments.blocks.split(",")):
        model, out = arguments.folder / f"dense-{blocks}", arguments.folder / f"small-{blocks}"
        try:
            shape = Shape(
                blocks,
                arguments.hidden,
                arguments.mlp,
                arguments.heads,
                arguments.kv_heads,
                arguments.vocabulary,
                arguments.samples,
                arguments.length,
            )
            parameters = write_model(model, shape)
            print(row(blocks, parameters, model, out, arguments), flush=True)
        finally:
            for rest in (model, out, out.with_name(f".{out.name}.partial"), cache(arguments)):
                shutil.rmtree(rest, ignore_errors=True)


def cache(arguments: argparse.Namespace) -> Path:
    """Where scores are kept, so that no row finds any from before."""
    return Path(arguments.folder, "cache")


def row(blocks: int, parameters: int, model: Path, out: Path, arguments: argparse.Namespace) -> str:
    """Compress it and say what that took."""
    flags = ["--method", arguments.method, "--keep", str(arguments.keep), "--stream", "on"]
    flags += ["--samples", str(arguments.samples), "--length", str(arguments.length)]
    flags += ["--eval-windows", "2", "--new-tokens", "2"]
    limit = int(arguments.memory * 10**9)

    def limited() -> None:
        if limit:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    command = [sys.executable, "-c", WATCHED, "compress", str(model), str(out), *flags]
    start = time.perf_counter()
    done = subprocess.run(
        command,
        preexec_fn=limited,
        env={**os.environ, "XDG_CACHE_HOME": str(cache(arguments))},
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(done.stderr[-4000:])
    peak = int(done.stderr.rpartition("PEAK ")[2].split()[0])
    report = json.loads((out / "secateur" / "report.json").read_text())
    spent = report["seconds"]
    forward = spent["calibration_forward"]
    times = sum(spent[stage] for stage in ("calibrate", "curves", "allocate", "apply")) / forward
    judged = max(report[name]["peak_memory_bytes"] for name in ("dense", "compressed"))
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    return (
        f"| {blocks} | {parameters / 1e9:.2f}B | {size / 1e9:.2f} | {peak / 1e9:.2f} | "
        f"{judged / 1e9:.2f} | {seconds:.0f} | {times:.1f} |"
    )


if __name__ == "__main__":
    main()
