"""The page of a sweep: the frontiers of its runs, each with a link to its own page."""

from pathlib import Path
from typing import Any

from secateur.cli import parse as asked
from secateur.io.run_directory import write_whole
from secateur.report.html import rendered
from secateur.report.html.content import compared
from secateur.utils.naming import short_name


def write_frontier(path: Path, content: dict[str, Any]) -> None:
    """Write it; ``content`` is what ``frontier_table.compare`` says, and what failed."""
    count = len(content["runs"])
    values = {
        "name": short_name(content["model"]["source"]),
        "runs": "One run" if count == 1 else f"{count} runs",
        "comparison": compared(content, linked=True),
        "failed": content["failed"],
        "command": asked.COMMAND.get(),
    }
    write_whole(path, rendered(values, "frontier.html"))
