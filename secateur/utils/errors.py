"""The one error that a user's input can cause."""

import difflib
import reprlib
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

SHOWN = 200  # characters of what a stranger wrote that a message repeats


class _Short(reprlib.Repr):
    """A ``repr`` of bounded length, however large the thing is."""

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
    """Something the user gave can't be used; the message says what, where and what to do next."""


class RunError(RuntimeError):
    """A run failed for no fault of its input: a measuring process died, or a reload differs."""


class HaltedError(RunError):
    """Something outside stopped a run: a disk, a file, memory. What is finished stays for later."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """ "Did you mean X?" and the full list: sentences for a message about an unknown name."""
    known = sorted(choices)
    close = difflib.get_close_matches(name[:100], known, n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(known)}."


def refuse_difference(
    what: str, there: Mapping[str, Any], here: Mapping[str, Any], advice: str
) -> None:
    """Refuse something kept on disk that is of something else.

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
    """What an error says, without what it says below that; of a silent one the name."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def out_of_memory(error: Exception) -> bool:
    """Whether it says that an allocation failed, by whichever allocator."""
    told = ("allocate memory", "out of memory", "bad_alloc")
    return isinstance(error, MemoryError) or any(part in str(error).lower() for part in told)


def shown(value: Any) -> str:
    """What a stranger wrote as a message may repeat it: quoted, one line, not too long."""
    text = _Short().repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def words(text: str) -> str:
    """A sentence of a library, which may repeat what a stranger wrote: one line, not too long."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= SHOWN else f"{line[:SHOWN]}…"


def printable(text: str) -> str:
    """A message without characters that could steer a terminal; lines stay."""
    kept = (
        c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )
    return "".join(kept)
