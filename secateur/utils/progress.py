"""Progress bars in a terminal, plain messages elsewhere."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int], None]


class Progress:
    """Silent progress, the default."""

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Advance]:
        """Run a stage of ``total`` steps; the yielded function takes the number of steps just
        done.
        """
        yield lambda _: None

    def say(self, message: str) -> None:
        """Show a message that is not an error."""


class Lines(Progress):
    """Messages on stderr, without bars."""

    def say(self, message: str) -> None:
        """Show a message that is not an error."""
        print(message, file=sys.stderr, flush=True)


class Bars(Lines):
    """One progress bar with the remaining time per stage, on stderr; removed at its end."""

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Advance]:
        """Run a stage of ``total`` steps; the yielded function takes the number of steps just
        done.
        """
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description:<28}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        # the stderr of now: what is silenced inside a stage does not silence its bar
        with RichProgress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
            task = bar.add_task(title, total=total)
            yield lambda steps: bar.advance(task, steps)


def for_terminal() -> Progress:
    """Bars if stderr is a terminal, plain lines otherwise."""
    return Bars() if sys.stderr.isatty() else Lines()
