"""The page of a sweep: the frontiers of its runs, each with a link to its own page."""

from pathlib import Path
from typing import Any

from secateur.io.run_directory import write_whole
from secateur.report.html import rendered
from secateur.report.html.content import compared
from secateur.utils.naming import short_name


def write_frontier(path: Path, content: dict[str, Any], command: str | None = None) -> None:
    """Write it; ``content`` is what ``frontier_table.compare`` says, and what failed.

    ``command`` is the command line that asked for the sweep.
    """
    count = len(content["runs"])
    values = {
        "name": short_name(content["model"]["source"]),
        "runs": "One run" if count == 1 else f"{count} runs",
        "comparison": compared(content, linked=True),
        "failed": content["failed"],
        "command": command,
    }
    write_whole(path, rendered(values, "frontier.html"))
