"""Where tables are printed."""

from rich.console import Console

WIDTH = 100


def terminal() -> Console:
    """A terminal of at most 100 columns; what is no terminal has as many."""
    console = Console(highlight=False)
    if not console.is_terminal or console.width > WIDTH:
        console = Console(highlight=False, width=WIDTH)
    return console
