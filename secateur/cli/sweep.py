"""The command `sweep`. Heavy modules are imported only when it runs."""

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from secateur.cli import parse as asked
from secateur.cli.options import judge_options, open_options, owners_of, stream_option, text_options
from secateur.structure.budget import LEAST, Budget, flag_of, key_of
from secateur.utils.errors import InputError

if TYPE_CHECKING:
    from secateur.sweeps.grid import SweepRecord
    from secateur.sweeps.sweep import Sweep

BUDGET = {key_of(field): field for field in fields(Budget)}
#: what a sweep file says by itself
GRID = ("method", "recipe", "allocator", *BUDGET)
SUFFIXES = (".yaml", ".yml")


def several_budgets(command: Any) -> Any:
    """The options of a budget, each with several values by commas."""
    for key, field in reversed(BUDGET.items()):
        default = field.metadata.get("usual", field.default)
        shown = field.metadata["help"].partition(":")[0].removesuffix(".")
        option = click.option(
            f"--{flag_of(field)}",
            key,
            metavar=f"{flag_of(field)[0].upper()},…",
            help=f"{shown}; several values by commas  [default: {default}]",
        )
        command = option(command)
    return command


class SweepCommand(click.Command):
    """A command that says where to put the options of methods."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As usual."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if not (owners := owners_of(error.option_name)):
                raise
            message = f"{error.option_name} belongs to {owners}; write such options in a sweep "
            message += "file (docs/sweeps.md)."
            raise click.NoSuchOption(error.option_name, message, ctx=ctx) from error


@click.command(cls=SweepCommand)
@click.argument("source", metavar="MODEL|SWEEP.yaml")
@click.argument("out", required=False, type=click.Path(path_type=Path))
@click.option(
    "--method", "-m", metavar="M,M,…", help="Methods, separated by commas  [default: auto]"
)
@click.option(
    "--recipe",
    multiple=True,
    metavar="FILE",
    help="Recipe to run at every --keep; can be repeated.",
)
@click.option(
    "--allocator", metavar="A,A,…", help="Allocators, separated by commas  [default: each method's]"
)
@several_budgets
@text_options
@judge_options
@open_options
@stream_option
@click.option(
    "--jobs", default=1, show_default=True, type=click.IntRange(1), help="Number of parallel runs."
)
@click.option(
    "--ray",
    is_flag=False,
    flag_value="local",
    metavar="[ADDRESS]",
    help="Run as tasks of Ray (extra `ray`) on this machine, or on the cluster at ADDRESS, whose "
    "machines share the folders. Without ADDRESS, give this option last.",
)
@click.option(
    "--cpus", default=1, show_default=True, type=click.IntRange(1), help="CPUs per run with --ray."
)
@click.option(
    "--gpus",
    type=click.FloatRange(0),
    help="GPUs per run with --ray  [default: 1 if there are any]",
)
@click.option("--dry-run", is_flag=True, help="List the runs without starting them.")
@click.pass_context
def sweep(
    ctx: click.Context,
    /,
    source: str,
    out: Path | None,
    as_json: bool,
    jobs: int,
    ray: str | None,
    cpus: int,
    gpus: float | None,
    dry_run: bool,
    **rest: Any,
) -> None:
    """Compress MODEL with several methods and budgets, and compare the results.

    \b
    secateur sweep MODEL OUT --keep 0.9,0.8,0.7 --method auto,modegpt,flap
    secateur sweep SWEEP.yaml

    Each run is written to a folder in OUT, as `compress` would write it. The dense model is
    measured once, and runs share statistics and scores. To resume an interrupted sweep, repeat the
    command. By default OUT is named after the sweep file.
    """
    from secateur.evaluate.evaluator import quiet
    from secateur.sweeps.on_ray import Cluster
    from secateur.sweeps.show import show_list, show_outcome
    from secateur.sweeps.sweep import by_ray, locally

    for name in ("cpus", "gpus"):
        if ray is None and asked.typed(ctx, name):
            raise InputError(f"--{name} applies to runs with Ray; add --ray.")
    if ray is not None and jobs > 1:
        raise InputError(
            "--jobs and --ray cannot be combined; with Ray, --cpus limits parallel runs."
        )
    quiet()
    planned = _planned(ctx, source, out, rest)
    if dry_run:
        content = planned.listed()
        asked.print_json(content) if as_json else show_list(content)
        return
    progress = planned.inputs.context.progress
    if ray is not None:
        way = by_ray(progress, Cluster(ray, cpus, gpus))
    else:
        way = locally(progress, planned.folder, jobs)
    if planned.inputs.questions.speed and (jobs > 1 or ray is not None):
        progress.say(
            "note: parallel runs disturb each other's timing; use --no-speed to leave it out"
        )
    content = planned.do(way)
    asked.print_json(content) if as_json else show_outcome(content)
    if failed := content["failed"]:
        raise InputError(
            f"{len(failed)} of {len(planned.runs)} runs failed: {', '.join(failed)}. "
            f"The others are in {str(planned.folder.out)!r}."
        )


def _planned(ctx: click.Context, source: str, out: Path | None, options: dict[str, Any]) -> "Sweep":
    """The sweep that a file or the flags ask for, looked at and not started.

    Raises:
        InputError: anything wrong with it.
    """
    from secateur.data.tasks import use_of
    from secateur.models.loading import read_config
    from secateur.pipeline import input_checks as inputs
    from secateur.sweeps.sweep import Sweep

    record = _record(ctx, source, options)
    model = record.model or source
    if out is None:
        if record.model is None:
            raise InputError("give the folder for the runs: secateur sweep MODEL OUT …")
        out = Path(Path(source).stem)
    options |= {k: v for k, v in record.options().items() if not asked.typed(ctx, k)}
    calibration, settings = asked.calibration(options), asked.settings(options)
    asked.refuse_lengths(ctx, use := use_of(read_config(model, settings)))
    texts = inputs.default_texts(calibration, use)
    return Sweep.of(
        model,
        out,
        record.asked(),
        calibration=calibration,
        questions=asked.questions(options, texts, calibration.length),
        settings=settings,
        context=asked.context(ctx),
    )


def _record(ctx: click.Context, source: str, options: dict[str, Any]) -> "SweepRecord":
    """What is asked for, by a file or by flags, which leave ``options``."""
    from secateur.data.tokens import expanded
    from secateur.sweeps.grid import SweepRecord, read_sweep

    given = {name: options.pop(name) for name in GRID}
    if source.endswith(SUFFIXES):
        for name in GRID:
            if asked.typed(ctx, name):
                raise InputError(
                    f"--{_flag(name)} and a sweep file exclude each other; say it there."
                )
        record = read_sweep(expanded(source))
        if record.model is None:
            raise InputError(f"sweep {source!r}: it names no model; add `model: …`.")
        return record
    values = {name: _values(name, given[name]) for name in GRID if name != "recipe"}
    entry = {name: found for name, found in values.items() if found and name != "keep"}
    runs: list[dict[str, Any]] = [{"recipe": file} for file in given["recipe"]]
    if entry and runs and "method" not in entry:
        flag = _flag(next(iter(entry)))
        raise InputError(f"--{flag}: a recipe says that itself; it is for a --method beside it.")
    if entry or not runs:
        runs.insert(0, {"method": ("auto",), **entry})
    return SweepRecord.model_validate({"keep": values["keep"] or None, "runs": runs})


def _flag(name: str) -> str:
    return flag_of(BUDGET[name]) if name in BUDGET else name


def _values(name: str, text: str | None) -> tuple[Any, ...]:
    """What an option says, by commas.

    Raises:
        InputError: there is no value, a number is none, or it is not in its interval.
    """
    if text is None:
        return ()
    words = _words(text)
    if not words:
        raise InputError(f"--{_flag(name)} {text!r}: no value stands between the commas.")
    if name == "keep":
        numbers = _numbers(name, ",".join(word for word in words if word != LEAST) or "1", float)
        found = iter(numbers)
        return tuple(LEAST if word == LEAST else next(found) for word in words)
    if name in BUDGET and "low" in BUDGET[name].metadata:
        return _numbers(_flag(name), text, int)
    return words


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(flag: str, text: str, kind: Any) -> tuple[Any, ...]:
    """What is typed between commas.

    Raises:
        InputError: something is no number, or none is there, or it is no share or grain.
    """
    most = 1 if kind is float else 2**30
    try:
        found = tuple(kind(word) for word in _words(text))
    except ValueError:
        found = ()
    if not found or not all(0 <= value <= most for value in found):
        wanted = "shares from 0 to 1" if kind is float else "whole numbers"
        example = "0.9,0.8" if kind is float else "8,32"
        raise InputError(f"--{flag} {text!r}: give {wanted} with commas between, e.g. {example}.")
    return found
