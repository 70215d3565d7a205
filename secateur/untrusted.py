"""Files from strangers: read up to a limit, and made into plain data of bounded size and depth."""

import json
import math
import os
import re
import reprlib
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

MAX_DEPTH = 64
MAX_NODES = 2**22  # values and names of a file; some 60 bytes each in memory
MAX_DIGITS = 40
SHOWN = 200  # characters of what a stranger wrote that a message repeats

_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_ESCAPE = re.compile(rb"\\(u[dD][89abAB]..\\u[dD][c-fC-F]..|u....|.)", re.DOTALL)
_OTHERS = bytes(set(range(256)) - set(b"[]{},:"))
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1, ord(","): 0, ord(":"): 0}

_SHORT = reprlib.Repr()
_SHORT.maxstring, _SHORT.maxlist, _SHORT.maxlevel = SHOWN, 12, 3


class HostileError(ValueError):
    """What is wrong with the content of a file; the reader adds which file it is."""


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """A file to read, and its size.

    Raises:
        OSError: it can't be read.
        HostileError: it is no file; reading a pipe would wait for ever.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except ValueError as error:  # a path with a NUL in it
        raise HostileError(str(error)) from error
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise HostileError("it is no file")
        yield file, found.st_size


def read_bytes(path: Path, most: int, what: str = "file of this kind") -> bytes:
    """A file's bytes; ``what`` says in messages what is never larger than ``most``.

    Raises:
        OSError: it can't be read.
        HostileError: it is no file, or too large.
    """
    with opened(path) as (file, size):
        if size > most:
            raise HostileError(f"larger than any {what}; is it the right file?")
        return file.read(most)


def parse_json(raw: bytes, most_nodes: int = MAX_NODES) -> Any:
    """Plain data from JSON that is what it should be: bounded, finite, every name once.

    Size and depth are looked at before anything is made of it.

    Raises:
        HostileError: it is not.
    """
    bare = _STRING.sub(b"", raw).translate(None, _OTHERS)
    if len(bare) > 2 * most_nodes:
        raise HostileError(f"more than {most_nodes} values")
    if max(accumulate(map(_STEP.__getitem__, bare)), default=0) > MAX_DEPTH:
        raise HostileError(f"nested deeper than {MAX_DEPTH} levels")
    if rb"\ud" in raw.lower() and any(
        found[1][:2].lower() == b"ud" and found[1][2:3] in b"89abcdefABCDEF" and len(found[1]) == 5
        for found in _ESCAPE.finditer(raw)
    ):
        raise HostileError("half of a character (a lone surrogate)")
    try:
        return json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_once,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_short,
        )
    except HostileError:
        raise
    except UnicodeDecodeError as error:
        raise HostileError(f"no UTF-8 ({error.reason})") from error
    except ValueError as error:
        raise HostileError(f"no JSON: {error}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise HostileError(f"{shown(twice)} is there twice")
    return made


def _refuse_constant(name: str) -> float:
    raise HostileError(f"{name} is no number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise HostileError(f"{shown(digits)} is too large a number")
    return value


def _short(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise HostileError(f"a number of {len(digits)} digits")
    return int(digits)


def shown(value: Any) -> str:
    """What a stranger wrote as a message may repeat it: quoted, one line, not too long."""
    text = _SHORT.repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def printable(text: str) -> str:
    """A message without characters that could steer a terminal; lines stay."""
    kept = (
        c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )
    return "".join(kept)


def plain_name(name: str, suffixes: Sequence[str] = ()) -> bool:
    """Whether a name is that of a file in its own folder: it leads nowhere else."""
    own = 0 < len(name) < 256 and name not in (".", "..") and not set(name) & set("/\\\0:")
    return own and name.isprintable() and (not suffixes or name.endswith(tuple(suffixes)))
