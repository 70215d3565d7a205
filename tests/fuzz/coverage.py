"""Bytes that lead into parts of a parser that no bytes have led into: Atheris."""

import os
import sys
from pathlib import Path
from random import Random
from typing import Any

from secateur.utils.errors import InputError
from tests.fuzz import watch
from tests.fuzz.targets import Target

MODULES = (
    "secateur.io.safe_parse",
    "secateur.io.safetensors_header",
    "secateur.io.schema",
    "secateur.planning.plan",
    "json",
)
SEEDS = 200


def search(target: Target, room: Path, seconds: int) -> int:
    """Let Atheris look for a file that is neither read nor refused; its exit code.

    It ends its process without clearing up, so that is another one.
    """
    try:
        import atheris
    except ImportError:
        sys.exit("--engine atheris: it is not installed; pip install 'secateur[fuzz]'.")
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    corpus = room.parent / "corpus"
    corpus.mkdir()
    for number in range(SEEDS):
        (corpus / str(number)).write_bytes(target.made(Random(number)))
    for name in MODULES:
        instrument(atheris, sys.modules[name])
    watching = watch.Watch(room)

    def once(raw: bytes) -> None:
        target.file.write_bytes(raw)
        watching.faults.clear()
        watching.active = True
        try:
            target.read()
        except InputError:
            pass
        finally:
            watching.active = False
        assert not watching.faults, watching.faults

    most = f"-max_total_time={seconds}"
    flags = [most, "-max_len=65536", "-timeout=20", "-rss_limit_mb=4096", "-print_final_stats=1"]
    found = f"-artifact_prefix={Path.cwd()}/failed-"
    atheris.Setup([sys.argv[0], *flags, found, str(corpus)], once)
    atheris.Fuzz()
    return 0


def instrument(atheris: Any, module: Any) -> None:
    """Count the branches of every function of a module."""
    for value in vars(module).values():
        functions = vars(value).values() if isinstance(value, type) else (value,)
        for function in functions:
            own = getattr(function, "__module__", None) == module.__name__
            if own and hasattr(function, "__code__"):
                atheris.instrument_func(function)
