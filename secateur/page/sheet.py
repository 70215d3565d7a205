"""The page of a sweep: the frontiers of its runs, each with a link to its own page."""

from pathlib import Path
from typing import Any

from secateur import asked
from secateur.names import short_name
from secateur.page import rendered
from secateur.page.content import compared
from secateur.workspace import write_whole


def write_frontier(path: Path, content: dict[str, Any]) -> None:
    """Write it; ``content`` is what :func:`~secateur.compare.compare` says, and what failed."""
    count = len(content["runs"])
    values = {
        "name": short_name(content["model"]["source"]),
        "runs": "One run" if count == 1 else f"{count} runs",
        "comparison": compared(content, linked=True),
        "failed": content["failed"],
        "command": asked.COMMAND.get(),
    }
    write_whole(path, rendered(values, "frontier.html"))
