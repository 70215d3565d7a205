"""Killed at any moment, a run that is typed again ends with the same bytes.

    python benchmarks/kills.py FOLDER [--moments 25] [OPTIONS OF COMPRESS]

Runs ``secateur compress demo`` undisturbed, then as often as asked with SIGKILL at a random moment
(and, every third time, at two more on the way), types it again until it ends, and holds every file
against the undisturbed ones, the report but for its times. Between, OUT must not exist or be
whole. Exits with 1 if anything differs.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import secateur.cli.main
from secateur.models.loading import open_model
from secateur.models.model import Settings

SHOWN = ("report.json", "report.html", "README.md")  # have seconds in them
TIMES = ("seconds", "peak_memory_bytes", "command")  # of a run and of no other
GIVEN = ["--keep", "0.7", "--samples", "8", "--length", "64", "--eval-windows", "4"]
GIVEN += ["--eval-length", "64", "--no-speed", "--new-tokens", "4"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--moments", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    arguments, more = parser.parse_known_args()
    folder, options = arguments.folder.resolve(), GIVEN + more
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    start = time.perf_counter()
    if run(folder, "undisturbed", options, None) != 0:
        sys.exit("the undisturbed run failed")
    whole = time.perf_counter() - start
    expected, wrong = digests(folder / "undisturbed"), 0
    print(f"undisturbed: {whole:.0f} s. | moment | died | went on for | same |", flush=True)
    choose, number = random.Random(arguments.seed), 0
    while number < arguments.moments:
        name, moments = f"killed-{number}", [choose.uniform(0, 1) * whole]
        moments += [choose.uniform(0, 0.6) * whole for _ in range(2 * (number % 3 == 2))]
        died = []
        for moment in moments:
            start = time.perf_counter()
            code = run(folder, name, options, moment)
            died.append(code == -signal.SIGKILL)
            if (folder / name).exists():
                open_model(folder / name, Settings(device="cpu"))
                break
        if not any(died):  # it was over before its moment: the machine is quicker by now
            whole = min(whole, time.perf_counter() - start)
            clear(folder, name)
            continue
        number += 1
        start, code = time.perf_counter(), 0
        if not (folder / name).exists():
            code = run(folder, name, options, None)
        seconds = time.perf_counter() - start
        found = digests(folder / name) if code == 0 else {}
        differing = sorted(n for n in {*found, *expected} if found.get(n) != expected.get(n))
        same = not differing
        left = [p.name for p in folder.iterdir() if p.name.startswith(f".{name}")]
        wrong += not same or bool(left)
        told = " ".join(f"{moment / whole:.2f}" for moment in moments)
        print(
            f"| {number} | {told} | {died} | {seconds:.0f} s | {same or differing} | {left} |",
            flush=True,
        )
        clear(folder, name)
    sys.exit(wrong > 0)


def run(folder: Path, name: str, options: list[str], moment: float | None) -> int:
    """The exit code of one compress command, or minus the signal that it died from."""
    child = os.fork()  # everything is imported already
    if not child:
        os.setsid()
        sys.stdout = sys.stderr = (folder / f"{name}.log").open("a")
        os.environ["XDG_CACHE_HOME"] = str(folder / f"{name}.cache")
        sys.argv = ["secateur", "compress", "demo", str(folder / name), *options]
        code = 1
        try:
            secateur.cli.main.main()
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            os._exit(code)
    if moment is not None:
        time.sleep(moment)
        subprocess.run(["pkill", "-KILL", "-s", str(child)], check=False)  # and what it started
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def clear(folder: Path, name: str) -> None:
    """Remove a run, and what it has kept for others."""
    for path in (folder / name, folder / f"{name}.cache"):
        shutil.rmtree(path, ignore_errors=True)


def digests(folder: Path) -> dict[str, str]:
    """Of all files but those that show times, and of the report without them."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    found = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name not in SHOWN
    }
    for path in files:
        if path.name == "report.json":
            report = json.dumps(timeless(json.loads(path.read_text())), sort_keys=True)
            found[path.name] = hashlib.sha256(report.encode()).hexdigest()
    return found


def timeless(content: Any) -> Any:
    """Without what no two runs share."""
    if isinstance(content, dict):
        return {key: timeless(value) for key, value in content.items() if key not in TIMES}
    return content


if __name__ == "__main__":
    main()
