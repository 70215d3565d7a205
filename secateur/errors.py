"""The one error that a user's input can cause."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class InputError(ValueError):
    """Something the user gave can't be used; the message says what, where and what to do next."""


class RunError(RuntimeError):
    """A run failed for no fault of its input: a measuring process died, or a reload differs."""


class HaltedError(RunError):
    """Something outside stopped a run: a disk, a file, memory. What is finished stays for later."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """ "Did you mean X?" and the full list: sentences for a message about an unknown name."""
    known = sorted(choices)
    close = difflib.get_close_matches(name, known, n=1)
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
                f"{what} are of something else: {name} is {found!r} there and {value!r} here. "
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
