"""Commands that work on finished runs. Heavy modules are imported only when they run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from secateur.cli import parse as asked
from secateur.cli.options import model_argument, open_options
from secateur.utils.errors import InputError, nearest

EXPORTS = ("gguf", "onnx", "plain")

folder = click.Path(path_type=Path)


@click.command()
@click.argument("runs", nargs=-1, required=True, type=folder, metavar="RUN...")
@click.option("--plot", type=folder, metavar="FILE.svg", help="Write the frontiers as a picture.")
@click.option("--overwrite", is_flag=True, help="Replace the picture if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compare(runs: tuple[Path, ...], plot: Path | None, overwrite: bool, as_json: bool) -> None:
    """Compare RUNs, folders that `compress` wrote, in one table that shows which are dominated.

    The runs must have the same dense model and an evaluation text in common. `--plot` writes their
    frontiers as a picture, and `report --siblings` shows them on the page of a run.
    """
    from secateur.io.run_directory import write_whole
    from secateur.report import frontier_table as comparing

    sheets = {run for run in runs if run.name in comparing.SHEETS and run.is_file()}  # of a sweep
    content = comparing.compare([run for run in runs if run not in sheets] or runs)
    if plot is not None:
        from secateur.report.html.content import standalone

        if plot.suffix.lower() != ".svg":
            raise InputError(
                f"--plot {str(plot)!r}: the picture is SVG; give a name that ends in .svg."
            )
        if not plot.absolute().parent.is_dir():
            raise InputError(f"--plot {str(plot)!r}: there is no folder {str(plot.parent)!r}.")
        if plot.exists() and not overwrite:
            raise InputError(f"--plot {str(plot)!r} exists already; --overwrite replaces it.")
        write_whole(plot, standalone(content))
    if as_json:
        asked.print_json(content)
    else:
        comparing.show(content)


@click.command()
@click.argument("run", type=folder)
@click.option(
    "--siblings",
    multiple=True,
    type=folder,
    metavar="RUN",
    help="Another run of the same dense model to compare with; can be repeated.",
)
def report(run: Path, siblings: tuple[Path, ...]) -> None:
    """Write the report page and the model card of RUN, a folder that `compress` wrote, again."""
    from secateur.report.html import write_page
    from secateur.report.model_card import write_card
    from secateur.report.run_records import read_run

    page = write_page(run, siblings)
    card = write_card(read_run(run))
    print(f"{page}\n{card}")


@click.command()
@click.argument("run", type=folder)
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make the repository private.")
def push(run: Path, repo: str, private: bool) -> None:
    """Upload RUN, a folder that `compress` wrote, to REPO (USER/NAME) on the hub.

    The upload includes recipe.yaml and report.json, which contain paths as you typed them.
    """
    from secateur.report import hub as pushing
    from secateur.utils.progress import for_terminal

    print(pushing.push(run, repo, private, for_terminal()))


@click.command()
@model_argument
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--dense", is_flag=True, help="Multiply all forms out to dense weights.")
@click.option(
    "--to",
    help="gguf: a file for llama.cpp, which is run in llama.cpp and compared; plain: stock classes "
    "of transformers, if all layers have the same shapes; onnx: a graph for onnxruntime.",
)
@click.option(
    "--type",
    "kind",
    default="auto",
    show_default=True,
    help="Number format of the matrices in a GGUF file: f32, f16, bf16, q8_0, q4_0, q4_k_m, q5_k_m "
    "or q6_k; auto is the stored format.",
)
@click.option("--no-tokenizer", is_flag=True, help="Leave the tokenizer out of a GGUF file.")
@click.option("--unchecked", is_flag=True, help="Do not check a GGUF file in llama.cpp.")
@open_options
@click.option("--overwrite", is_flag=True, help="Replace OUT when the new result is complete.")
@click.pass_context
def export(
    ctx: click.Context,
    /,
    model: str,
    out: Path,
    dense: bool,
    to: str | None,
    kind: str,
    no_tokenizer: bool,
    unchecked: bool,
    as_json: bool,
    overwrite: bool,
    **rest: Any,
) -> None:
    """Convert MODEL, a compressed checkpoint, for software that does not know Secateur."""
    from secateur.evaluate.evaluator import quiet

    if dense == (to is not None):
        raise InputError(
            "give one of: --dense (multiply all forms out to dense weights), --to gguf (a file for "
            "llama.cpp), --to plain (a checkpoint for stock classes), --to onnx (a graph)."
        )
    if to not in (None, *EXPORTS):
        raise InputError(f"unknown --to {to!r}. {nearest(to, EXPORTS)}")
    for name in ("kind", "no_tokenizer", "unchecked"):
        if to != "gguf" and asked.typed(ctx, name):
            flag = {"kind": "type"}.get(name, name.replace("_", "-"))
            raise InputError(f"--{flag} applies to --to gguf only; leave it out.")
    quiet()
    given = {"settings": asked.settings(rest), "overwrite": overwrite}
    if to == "gguf":
        given |= {"kind": kind, "tokenizer": not no_tokenizer, "checked": not unchecked}
    content, show = _exported(model, out, to, given)
    if as_json:
        asked.print_json({"out": str(out), **content})
    else:
        show()


def _exported(
    model: str, out: Path, to: str | None, given: dict[str, Any]
) -> tuple[dict[str, Any], Callable[[], None]]:
    """What is written, as plain data, and what shows it."""
    from dataclasses import asdict

    from secateur.cli import render as present
    from secateur.export.checkpoint import export_dense, export_plain
    from secateur.utils.progress import for_terminal

    given["progress"] = for_terminal()
    if to == "gguf":
        from secateur.export.gguf.export import export_gguf

        made = export_gguf(model, out, **given)
        return asdict(made), lambda: present.show_gguf(out, made)
    if to == "plain":
        plain = export_plain(model, out, **given)
        return asdict(plain), lambda: present.show_plain(out, plain.model_type)
    if to == "onnx":
        from secateur.export.onnx import export_onnx

        graph = export_onnx(model, out, **given)
        return asdict(graph), lambda: present.show_graph(out, graph)
    tier = export_dense(model, out, **given)
    return {"tier": tier}, lambda: present.show_export(out, tier)


COMMANDS = (export, compare, report, push)
