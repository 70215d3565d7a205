"""The one error that a user's input can cause."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something the user gave can't be used; the message says what, where and what to do next."""


class RunError(RuntimeError):
    """A run failed for no fault of its input: a measuring process died, or a reload differs."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """ "did you mean X?" and the full list, for messages about an unknown name."""
    known = sorted(choices)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(known)}."
