"""Progress bars with time left for a person at a terminal, silence for everyone else."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int], None]


class Progress:
    """Says nothing; the one to pass where nobody watches."""

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Advance]:
        """Run a stage of ``total`` steps; the value takes the number of steps just done."""
        yield lambda _: None

    def say(self, message: str) -> None:
        """Tell the user something that is no error."""


class Lines(Progress):
    """Only messages, on stderr."""

    def say(self, message: str) -> None:
        """One line on stderr."""
        print(message, file=sys.stderr, flush=True)


class Bars(Lines):
    """A bar per stage on stderr, with time left, gone when the stage is over."""

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Advance]:
        """Show one bar while the stage runs."""
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
    """Bars where stderr is a terminal, plain lines elsewhere."""
    return Bars() if sys.stderr.isatty() else Lines()
