"""Consoles for tables."""

from rich.console import Console

WIDTH = 100


def terminal() -> Console:
    """A console of at most 100 columns; of 100 columns if the output is not a terminal."""
    console = Console(highlight=False)
    if not console.is_terminal or console.width > WIDTH:
        console = Console(highlight=False, width=WIDTH)
    return console
