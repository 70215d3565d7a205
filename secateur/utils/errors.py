"""Errors that the package raises on purpose, and their messages."""

import difflib
import reprlib
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

SHOWN = 200  # characters of what a stranger wrote that a message repeats


class _Short(reprlib.Repr):
    """A ``repr`` of bounded length."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring, self.maxlist, self.maxdict, self.maxlevel = SHOWN, 12, 12, 3

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:  # names stay in their order
        parts = [
            f"{self.repr1(name, level - 1)}: {self.repr1(value, level - 1)}"
            for name, value in islice(x.items(), self.maxdict if level > 0 else 0)
        ]
        return "{" + ", ".join(parts + ["..."] * (len(x) > len(parts))) + "}"


class InputError(ValueError):
    """The user's input can't be used. The message says what is wrong, where, and what to do."""


class RunError(RuntimeError):
    """A run failed although its input is valid, for example because a reload gives other
    results.
    """


class HaltedError(RunError):
    """A run was stopped from outside, by a disk, a file or memory. What is finished is kept."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """Text for messages about an unknown name: "Did you mean X?" and all valid names."""
    known = sorted(choices)
    close = difflib.get_close_matches(name[:100], known, n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(known)}."


def refuse_difference(
    what: str, there: Mapping[str, Any], here: Mapping[str, Any], advice: str
) -> None:
    """Refuse stored data that belong to something else.

    Raises:
        InputError: a field of ``here`` has another value ``there``; the message names the first.
    """
    for name, value in here.items():
        if (found := there.get(name)) != value:
            raise InputError(
                f"{what} are of something else: {name} is {shown(found)} there and {value!r} here. "
                f"{advice}"
            )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class if it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that an allocation failed."""
    told = ("allocate memory", "out of memory", "bad_alloc")
    return isinstance(error, MemoryError) or any(part in str(error).lower() for part in told)


def shown(value: Any) -> str:
    """Quote untrusted text for a message: on one line, escaped and shortened."""
    text = _Short().repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def words(text: str) -> str:
    """Shorten a library's message, which may contain untrusted text, to one line."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= SHOWN else f"{line[:SHOWN]}…"


def printable(text: str) -> str:
    """Escape characters that could control a terminal; line breaks stay."""
    kept = (
        c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )
    return "".join(kept)
