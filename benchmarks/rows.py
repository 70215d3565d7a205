"""Rows of a benchmark: JSON lines in a file, and a process of its own for what it lacks."""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Those of a benchmark that keeps its rows and measures each job in a process."""
    parser.add_argument("--rows", type=Path, help="JSON lines; measured rows are added")
    parser.add_argument("--kept", action="store_true", help="measure nothing that FILE lacks")
    parser.add_argument("--plot", type=Path, help="picture to write (extra: benchmarks)")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)


def gathered(arguments: argparse.Namespace, jobs: Sequence[Row]) -> list[Row]:
    """All rows, from the file or from a process each.

    A job is what its rows have in common. The script is called once more with it as ``--worker``
    and then prints them by :func:`tell`.
    """
    rows = read(arguments.rows)
    for job in () if arguments.kept else jobs:
        if any(job.items() <= row.items() for row in rows):
            continue
        command = [sys.executable, *sys.argv, "--worker", json.dumps(job)]
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        new = [json.loads(line) for line in answer.stdout.splitlines()]
        rows += new
        add(arguments.rows, new)
        print(f"{job}: {len(new)} rows", file=sys.stderr, flush=True)
    return rows


def tell(rows: Iterable[Row]) -> None:
    """Print each as soon as it is there."""
    for row in rows:
        print(json.dumps(row), flush=True)


def read(file: Path | None) -> list[Row]:
    """The rows of a file; none where there is no file yet."""
    if file is None or not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]


def add(file: Path | None, rows: Iterable[Row]) -> None:
    """Put rows at the end of a file, if one is named."""
    if file is not None:
        with file.open("a") as lines:
            lines.writelines(json.dumps(row) + "\n" for row in rows)
