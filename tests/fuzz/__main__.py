"""Many mutated files, each of which must be read or refused, and nothing else.

python -m tests.fuzz [--cases 20000] [--seed 0] [--kinds plan,config] [--case "plan 17"]
python -m tests.fuzz --engine atheris --kinds "weight header" [--seconds 60]

A traceback, a case of over 20 seconds, growth of memory by over a gigabyte, a write outside the
folder, anything unpickled, run or sent is a failure; the case is kept under --keep. The number of a
case and the seed make it anew.
"""

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

#: shares of all cases; the kinds that build a model are slower
SHARES = {
    **{"plan": 4, "recipe": 4, "config": 4, "checkpoint config": 3, "weight header": 5},
    **{"weights": 1, "index": 2, "report": 2, "run's plan": 1, "scores": 1, "statistics": 1},
    **{"journal": 1, "task file": 1, "text lines": 1, "block's statistics": 1, "sweep": 2},
    **{"unfinished run": 1, "shared by runs": 1},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", help="names, with commas between them; all by default")
    parser.add_argument("--case", help="repeat one, e.g. 'plan 17'")
    parser.add_argument("--keep", type=Path, help="folder for files that failed")
    parser.add_argument("--engine", choices=("random", "atheris"), default="random")
    parser.add_argument("--seconds", type=int, default=60, help="of each kind, with atheris")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = str(Path(folder, "cache"))
        return run(arguments, Path(folder).resolve())


def run(arguments: Any, folder: Path) -> int:
    import torch
    import transformers

    from tests.fuzz import watch
    from tests.fuzz.targets import Targets

    torch.set_num_threads(1)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    room = folder / "room"
    room.mkdir()
    targets = Targets(room).all
    kinds = arguments.kinds.split(",") if arguments.kinds else list(SHARES)
    if unknown := {*kinds} - {*SHARES}:
        sys.exit(f"unknown kinds {unknown}; known: {', '.join(SHARES)}")
    if arguments.engine == "atheris":
        from tests.fuzz.coverage import search

        return search(targets[kinds[0]](), room, arguments.seconds)
    watching = watch.Watch(room)
    whole = sum(SHARES[kind] for kind in kinds)
    counts = {kind: -(-arguments.cases * SHARES[kind] // whole) for kind in kinds}
    cases = [(kind, number) for kind, count in counts.items() for number in range(count)]
    if arguments.case:
        kind, _, number = arguments.case.rpartition(" ")
        cases = [(kind, int(number))]
    made = {kind: targets[kind]() for kind in dict.fromkeys(kind for kind, _ in cases)}
    for target in made.values():
        target.read() if target.file.exists() else None
    watch.limit_memory()
    outcomes: Counter[tuple[str, str]] = Counter()
    failures, start, slowest = 0, time.perf_counter(), (0.0, "")
    for kind, number in cases:
        began = time.perf_counter()
        try:
            found = watching.outcome(made[kind], Random(f"{arguments.seed} {kind} {number}"))
        except (Exception, watch.TookTooLongError):
            failures += 1
            print(f"FAILED {kind} {number}", flush=True)
            print("".join(traceback.format_exc().splitlines(True)[-9:])[-1500:], flush=True)
            if arguments.keep:
                arguments.keep.mkdir(parents=True, exist_ok=True)
                kept = arguments.keep / f"{kind} {number}{made[kind].file.suffix}"
                kept.write_bytes(made[kind].file.read_bytes())
            found = "failed"
        outcomes[kind, found] += 1
        slowest = max(slowest, (time.perf_counter() - began, f"{kind} {number}"))
    print("\n".join(watch.counted(outcomes)))
    seconds = time.perf_counter() - start
    print(
        f"\nseed {arguments.seed}; {failures} failures; {seconds:.0f} s, the slowest case "
        f"{slowest[0]:.1f} s ({slowest[1]})"
    )
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
