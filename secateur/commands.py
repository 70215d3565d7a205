"""Commands on finished runs. Nothing heavy is imported before a command needs it."""

import json
from pathlib import Path

import click

folder = click.Path(path_type=Path)


@click.command()
@click.argument("runs", nargs=-1, required=True, type=folder, metavar="RUN...")
@click.option("--plot", type=folder, metavar="FILE.svg", help="Draw the frontier on bytes.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
def compare(runs: tuple[Path, ...], plot: Path | None, as_json: bool) -> None:
    """Show RUNs, folders that `compress` wrote, in one table, and which are dominated.

    They must be of one dense model and have been judged on a common text. `report --siblings`
    draws their frontiers, `--plot` writes the first as a picture.
    """
    from secateur import compare as comparing
    from secateur.errors import InputError
    from secateur.workspace import write_whole

    content = comparing.compare(runs)
    if plot is not None:
        from secateur.page.content import standalone

        if plot.suffix.lower() != ".svg":
            raise InputError(f"--plot {str(plot)!r}: it is an SVG picture; name it so.")
        if not plot.absolute().parent.is_dir():
            raise InputError(f"--plot {str(plot)!r}: there is no folder {str(plot.parent)!r}.")
        write_whole(plot, standalone(content))
    if as_json:
        print(json.dumps(content, indent=1))
    else:
        comparing.show(content)


@click.command()
@click.argument("run", type=folder)
@click.option(
    "--siblings",
    multiple=True,
    type=folder,
    metavar="RUN",
    help="Another run of the same dense model, to be shown beside it; may be repeated.",
)
def report(run: Path, siblings: tuple[Path, ...]) -> None:
    """Write the report page and the model card of RUN, a folder that `compress` wrote, anew."""
    from secateur.card import write_card
    from secateur.page import write_page
    from secateur.runs import read_run

    page = write_page(run, siblings)
    card = write_card(read_run(run))
    print(f"{page}\n{card}")


@click.command()
@click.argument("run", type=folder)
@click.argument("repo")
@click.option("--private", is_flag=True, help="Only you, or your organisation, will see it.")
def push(run: Path, repo: str, private: bool) -> None:
    """Upload RUN, a folder that `compress` wrote, to REPO (USER/NAME) on the hub.

    Its record goes along: paths in recipe.yaml and report.json are as you typed them.
    """
    from secateur import push as pushing
    from secateur.progress import for_terminal

    print(pushing.push(run, repo, private, for_terminal()))


COMMANDS = (compare, report, push)
