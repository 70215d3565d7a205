"""The command line. Nothing heavy is imported before a command needs it."""

import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from secateur.cli import parse as asked
from secateur.cli.commands import COMMANDS
from secateur.cli.options import (
    MethodCommand,
    calibration_options,
    judge_options,
    model_argument,
    open_options,
    stream_option,
    text_options,
)
from secateur.cli.outcome import INTERRUPTED, Outcome
from secateur.cli.sweep import sweep
from secateur.utils.errors import HaltedError, InputError, RunError, out_of_memory, words
from secateur.utils.run_info import typed_command
from secateur.version import __version__

if TYPE_CHECKING:
    from secateur.distributed.collectives import Ranks
    from secateur.methods.base import Method
    from secateur.planning.plan import Plan
    from secateur.planning.recipe import Recipe


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="secateur")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Compress trained transformers: prune, quantize, sparsify, factorize, and measure the cost.

    \b
    secateur compress Qwen/Qwen2.5-0.5B out --keep 0.8     compress a model
    secateur inspect Qwen/Qwen2.5-0.5B                     what can be pruned
    secateur plan Qwen/Qwen2.5-0.5B --keep 0.8 --dry-run   what would be pruned
    secateur eval out                                      evaluate any model
    secateur sweep Qwen/Qwen2.5-0.5B outs --keep 0.9,0.8   compare several budgets
    """
    if ctx.obj.ranks is not None:
        from secateur.cli.launch import check_command

        check_command(ctx.invoked_subcommand, ctx.obj.ranks)


@cli.command(name="ls")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_all(as_json: bool) -> None:
    """List all methods and allocators with their options, and the supported model families."""
    from secateur.cli import render as present

    content = present.catalogue()
    asked.print_json(content) if as_json else present.show_catalogue(content)


@cli.command()
@model_argument
@open_options
@click.option(
    "--multiple-of",
    default=8,
    show_default=True,
    type=click.IntRange(1),
    help="Number of which MLP widths become multiples.",
)
@click.option(
    "--forms",
    is_flag=False,
    flag_value="all",
    metavar="[METHODS]",
    help="Compare the errors of these methods of forms (separated by commas, or all) at several "
    "shares of bytes; reads the weights.",
)
@text_options
def inspect(model: str, as_json: bool, multiple_of: int, forms: str | None, **rest: Any) -> None:
    """Show what can be pruned in MODEL, and the memory of calibration, without reading weights."""
    from secateur.cli import render as present

    if forms is None:
        content = present.inspection(model, asked.settings(rest), multiple_of)
        asked.print_json(content) if as_json else present.show_inspection(content)
        return
    from secateur.evaluate.evaluator import quiet
    from secateur.methods.forms import Forms, reshaping
    from secateur.pipeline.form_spectrum import spectrum
    from secateur.utils.progress import for_terminal

    quiet()
    methods = Forms(of=",".join(reshaping()) if forms == "all" else forms)
    given = (asked.calibration(rest), asked.settings(rest), for_terminal())
    content = spectrum(model, methods, *given)
    asked.print_json(content) if as_json else present.show_spectrum(content)


@cli.command(cls=MethodCommand)
@model_argument
@calibration_options
@open_options
@stream_option
@click.option("--output", "-o", default="plan.json", show_default=True, help="Plan file to write.")
@click.option("--dry-run", is_flag=True, help="Print the plan without writing it.")
@click.option("--overwrite", is_flag=True, help="Replace the plan file if it exists.")
@click.pass_context
def plan(
    ctx: click.Context,
    /,
    model: str,
    as_json: bool,
    output: str,
    dry_run: bool,
    overwrite: bool,
    scores: Path | None,
    statistics: Path | None,
    **rest: Any,
) -> None:
    """Plan the size of every unit of MODEL without changing any weight.

    The plan is a JSON file. You can read it, edit the sizes and apply it with `secateur compress
    --plan`. Scores are cached, so a plan for another budget takes seconds.
    """
    from tempfile import TemporaryDirectory

    from secateur.calibration.collect import Store
    from secateur.cli import render as present
    from secateur.evaluate.evaluator import quiet
    from secateur.methods.step import Step
    from secateur.models.loading import skeleton
    from secateur.pipeline.prepare import check_reach, prepare
    from secateur.pipeline.run_inputs import Inputs
    from secateur.planning.plan import write_plan

    path, context = Path(output), asked.context(ctx)
    if context.ranks.leader and not dry_run and path.exists() and not overwrite:
        raise InputError(f"{output!r} exists; choose another --output or add --overwrite.")
    if not dry_run and not path.parent.is_dir():
        raise InputError(f"--output {output!r}: there is no folder {str(path.parent)!r}.")
    quiet()
    step = Step.of(
        asked.method(ctx, rest), asked.budget(ctx, rest), asked.allocator(ctx, rest)
    ).filled
    calibration, settings = asked.calibration(rest), asked.settings(rest)
    shapes = skeleton(model, settings)
    asked.refuse_lengths(ctx, shapes.use)
    check_reach(shapes, step)
    inputs = Inputs.of(model, calibration, settings)
    with TemporaryDirectory() as passing:
        store = Store(statistics or Path(passing))
        made = prepare(inputs, step, context, store=store, scores=scores, only_plan=True).plan
    if not context.ranks.leader:
        return
    if not dry_run:
        write_plan(made, path)
    if as_json:
        print(made.to_json(), end="")
    else:
        present.show_plan(made, None if dry_run else path)


@cli.command(cls=MethodCommand)
@model_argument
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--plan", "plan_file", type=click.Path(path_type=Path), help="Apply this plan file.")
@click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    help="Run the steps of this YAML file; --keep is then a share of the bytes of all blocks.",
)
@calibration_options
@judge_options
@open_options
@stream_option
@click.option("--overwrite", is_flag=True, help="Replace OUT when the new result is complete.")
@click.pass_context
def compress(
    ctx: click.Context,
    /,
    model: str,
    out: Path,
    plan_file: Path | None,
    recipe: Path | None,
    as_json: bool,
    overwrite: bool,
    scores: Path | None,
    statistics: Path | None,
    **rest: Any,
) -> None:
    """Compress MODEL (a folder or hub id) and write the result to the new folder OUT.

    The dense model is measured first. The result is loaded in a fresh process, compared with the
    model in memory, and measured in the same way. To resume an interrupted run, repeat the command.
    """
    from secateur.cli import render as present
    from secateur.data.tasks import use_of
    from secateur.evaluate.evaluator import quiet
    from secateur.models.loading import read_config
    from secateur.pipeline.compress import run
    from secateur.pipeline.config import RunConfig
    from secateur.pipeline.input_checks import default_texts
    from secateur.planning.plan import read_plan
    from secateur.planning.recipe import read_recipe

    quiet()
    made: Method | Plan | Recipe
    asks: dict[str, Any] = {"settings": asked.settings(rest), "overwrite": overwrite}
    if recipe is not None:
        asked.refuse_beside(ctx, "recipe", {"plan_file", "scores", "statistics"})
        made, calibration = read_recipe(recipe, rest["keep"]), asked.calibration(rest)
    elif plan_file is not None:
        asked.refuse_beside(ctx, "plan", {"calibration", "samples", "length", "seed"})
        made = (replay := read_plan(plan_file))
        calibration = replay.calibration.choice()
    else:
        made, calibration = asked.method(ctx, rest), asked.calibration(rest)
        asks |= {"budget": asked.budget(ctx, rest), "allocator": asked.allocator(ctx, rest)}
    if recipe is None:
        asks |= {"scores": scores, "statistics": statistics}
    use = use_of(read_config(model, asks["settings"]))
    asked.refuse_lengths(ctx, use)
    questions = asked.questions(rest, default_texts(calibration, use), calibration.length)
    config = RunConfig(model, out, made, calibration=calibration, questions=questions, **asks)
    context = asked.context(ctx)
    report = run(config, context)
    if not context.ranks.leader:
        return
    if as_json:
        asked.print_json(report.content)
    else:
        present.show_report(report, out)


@cli.command(name="eval")
@model_argument
@judge_options
@click.option("--against", metavar="DENSE", help="Also measure this model and compare with it.")
@open_options
@stream_option
@click.pass_context
def evaluate(
    ctx: click.Context, /, model: str, as_json: bool, against: str | None, **rest: Any
) -> None:
    """Measure perplexity, speed and memory of MODEL, and print a sample, as `compress` does."""
    from dataclasses import asdict

    from secateur.cli import render as present
    from secateur.data.tasks import use_of
    from secateur.data.tokens import BUNDLED, Text
    from secateur.evaluate.evaluator import check_tasks, measure_in_subprocess
    from secateur.models.loading import read_config
    from secateur.pipeline.against import compare_models
    from secateur.utils.progress import for_terminal

    asked.refuse_lengths(ctx, use := use_of(read_config(model, asked.settings(rest))))
    questions = asked.questions(rest, (Text("Python docs (bundled)", BUNDLED),), None)
    check_tasks(use, questions.tasks)
    if against is not None:
        report = compare_models(model, against, questions, asked.settings(rest), for_terminal())
        asked.print_json(report.content) if as_json else present.show_comparison(report)
        return
    measurements = measure_in_subprocess(model, questions, asked.settings(rest), for_terminal())
    asked.print_json(asdict(measurements)) if as_json else present.show_verdict(measurements)


for command in (sweep, *COMMANDS):
    cli.add_command(command)


#: how to resume after an error
ON = "No incomplete file has a final name. To resume a compress or sweep command, repeat it."


def main() -> None:
    """Entry point. Errors that the user can correct end with one message and exit code 2."""
    warnings.formatwarning = lambda message, *_, **__: f"note: {message}\n"
    if "WORLD_SIZE" in os.environ:  # as torchrun says, or something like it
        from secateur.cli.launch import run_ranks

        sys.exit(run_ranks(_run))
    sys.exit(_run().show())


def _run(ranks: "Ranks | None" = None) -> Outcome:
    """Follow the command line, maybe as one of several ranks."""
    try:
        invocation = asked.Invocation(typed_command(sys.argv[1:]), ranks)
        return Outcome(cli.main(standalone_mode=False, obj=invocation) or 0)
    except click.exceptions.Abort as error:
        said = str(error.__cause__ or "")  # of another rank, where one ended
        return Outcome(1, said) if said else Outcome(INTERRUPTED)
    except click.ClickException as error:
        usage = error.ctx.get_usage() if isinstance(error, click.UsageError) and error.ctx else ""
        return Outcome(error.exit_code, error.format_message(), usage)
    except InputError as error:
        return Outcome(2, str(error))
    except RunError as error:
        return Outcome(2 if isinstance(error, HaltedError) else 1, str(error))
    except OSError as error:
        return Outcome(2, f"{words(str(error))}. {ON}")
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        advice = "Use --stream on to read the model block by block, or fewer --samples."
        return Outcome(2, f"there is not enough memory. {advice} {ON}")
