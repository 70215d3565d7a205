"""The page of a sweep: frontiers of its runs, with a link to the page of each."""

from pathlib import Path
from typing import Any

from secateur.io.run_directory import write_whole
from secateur.report.html import rendered
from secateur.report.html.content import compared
from secateur.utils.naming import short_name


def write_frontier(path: Path, content: dict[str, Any], command: str | None = None) -> None:
    """Write the page; ``content`` is the result of ``frontier_table.compare``, and what failed.

    ``command`` is the command line of the sweep.
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
