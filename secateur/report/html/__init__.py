"""The report page, a single HTML file without dependencies."""

from collections.abc import Sequence
from pathlib import Path

import jinja2

from secateur.io.run_directory import write_whole
from secateur.report.frontier_table import compare
from secateur.report.html.content import content
from secateur.report.run_records import RECORD, read_run

PAGE = "report.html"


def write_page(folder: Path, siblings: Sequence[Path] = ()) -> Path:
    """Write the report page of a finished run beside its report, and return its path.

    With ``siblings``, other runs of the same dense model, it shows the frontier. The page loads
    nothing and runs no script; all text from the report is escaped.

    Raises:
        InputError: a folder is no finished run, or the runs can't be compared.
    """
    run = read_run(folder)
    others = compare([run.folder, *siblings]) if siblings else None
    path = run.folder / RECORD / PAGE
    write_whole(path, rendered(content(run, others)))
    return path


def rendered(values: dict[str, object], template: str = PAGE) -> str:
    """Render the template; all values are escaped except our own markup."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)
