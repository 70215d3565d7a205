"""Reading untrusted files: limited size, and plain data of bounded size and depth."""

import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import yaml

from secateur.utils.errors import InputError, first_line, shown, words

MAX_DEPTH = 64
MAX_NODES = 2**22  # values and names of a file; some 60 bytes each in memory
MAX_DIGITS = 40
MAX_LINE = 2**24

_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_ESCAPE = re.compile(rb"\\(u[dD][89abAB]..\\u[dD][c-fC-F]..|u....|.)", re.DOTALL)
_OTHERS = bytes(set(range(256)) - set(b"[]{},:"))
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1, ord(","): 0, ord(":"): 0}


class HostileError(ValueError):
    """The content of a file is invalid; the caller adds the file's name."""


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open a file, and return it with its size.

    Raises:
        OSError: it can't be read.
        HostileError: it is no file; reading a pipe would wait for ever.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except ValueError as error:  # a path with a NUL in it
        raise HostileError(str(error)) from error
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise HostileError("it is no file")
    with os.fdopen(descriptor, "rb") as file:
        yield file, found.st_size


def refuse_links(folder: Path) -> None:
    """Refuse an output folder that is or contains a symbolic link, which could lead elsewhere.

    Raises:
        InputError: it is, or has.
    """
    for path in (folder, *folder.rglob("*")):
        if path.is_symlink():
            raise InputError(
                f"{str(path)!r} is a link, and nothing is written through it; remove it."
            )


@contextmanager
def opened_lines(path: Path) -> Iterator[TextIO]:
    """Open a UTF-8 text file, with or without a byte order mark.

    Raises:
        OSError, HostileError: as :func:`opened` does.
    """
    with opened(path) as (file, _), TextIOWrapper(file, "utf-8-sig", newline="") as text:
        yield text


def lines_of(text: TextIO) -> Iterator[tuple[int, str]]:
    """Nonempty lines with their numbers, split at \n only, as JSON may contain U+2028.

    Raises:
        HostileError: a line is too long.
    """
    number = 0
    while line := text.readline(MAX_LINE):
        number += 1
        if len(line) == MAX_LINE:
            raise HostileError(f"line {number} is longer than any")
        if line.strip():
            yield number, line


def read_bytes(path: Path, most: int, what: str = "file of this kind") -> bytes:
    """Read a file of limited size; ``what`` names it in messages.

    Raises:
        OSError: it can't be read.
        HostileError: it is no file, or too large.
    """
    with opened(path) as (file, size):
        if size > most:
            raise HostileError(f"larger than any {what}; is it the right file?")
        return file.read(size)  # so much is set aside for it


def parse_json(raw: bytes, most_nodes: int = MAX_NODES, finite: bool = True) -> Any:
    """Parse JSON with limits on size and depth, finite numbers and unique names.

    The limits are checked before objects are created. Unless ``finite``, NaN and Infinity are
    accepted as Python writes them.

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
            parse_constant=(lambda name: _refuse_constant(name, raw)) if finite else float,
            parse_float=_finite,
            parse_int=_short,
        )
    except HostileError:
        raise
    except UnicodeDecodeError as error:
        raise HostileError(f"no UTF-8 ({error.reason})") from error
    except ValueError as error:
        raise HostileError(f"not JSON: {words(str(error))}") from error


#: what its constructors raise of tags and texts that are not what they say
FAULTS_OF_YAML = (
    *(yaml.YAMLError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError),
    RecursionError,
)


class _Loader(yaml.SafeLoader):
    """YAML loader without aliases, which could expand without bounds, and with limits."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth: int = getattr(self, "depth", 0) + 1
        if self.check_event(yaml.AliasEvent):
            raise HostileError("aliases (*) are not read; write out what they stand for")
        if self.depth > MAX_DEPTH:
            raise HostileError(f"nested deeper than {MAX_DEPTH} levels")
        made: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return made

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        if isinstance(node, yaml.MappingNode):
            self.flatten_mapping(node)
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if len(set(names)) != len(node.value):
                ((name, count),) = Counter(names).most_common(1) or [("", 0)]
                raise HostileError(
                    f"{shown(name)} is there twice" if count > 1 else "a name is no word"
                )
        return super().construct_mapping(node, deep)


def parse_yaml(raw: bytes) -> Any:
    """Parse YAML with the limits of :func:`parse_json`.

    Raises:
        HostileError: it is no YAML, or has aliases, a name twice, or numbers beyond bounds.
    """
    try:
        found = yaml.load(raw.decode("utf-8"), _Loader)
    except HostileError:
        raise
    except UnicodeDecodeError as error:
        raise HostileError(f"no UTF-8 ({error.reason})") from error
    except FAULTS_OF_YAML as error:
        raise HostileError(f"no YAML: {words(first_line(error))}") from error
    _look(found)
    return found


def _look(value: Any) -> None:
    """Check numbers and strings in plain data against the limits of JSON."""
    left = [value]
    while left:
        found = left.pop()
        if isinstance(found, dict):
            left += [*found, *found.values()]
        elif isinstance(found, list | tuple | set):
            left += found
        elif isinstance(found, int) and abs(found) >= 10**MAX_DIGITS:
            raise HostileError(f"a number of more than {MAX_DIGITS} digits")
        elif isinstance(found, float) and not math.isfinite(found):
            raise HostileError(f"{found} is no number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise HostileError(f"{shown(twice)} is there twice")
    return made


def _refuse_constant(name: str, raw: bytes) -> float:
    """Refuse NaN and Infinity; the message shows what stands before the first of them."""
    before = raw[: raw.find(name.encode())].decode("utf-8", "replace")
    raise HostileError(f"{name} is no number, behind {shown(before[-40:])}")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise HostileError(f"{shown(digits)} is too large a number")
    return value


def _short(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise HostileError(f"a number of {len(digits)} digits")
    return int(digits)


def plain_name(name: str, suffixes: Sequence[str] = ()) -> bool:
    """Whether a name is that of a file in the same folder."""
    own = 0 < len(name) < 256 and name not in (".", "..") and not set(name) & set("/\\\0:")
    return own and name.isprintable() and (not suffixes or name.endswith(tuple(suffixes)))
