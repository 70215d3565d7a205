"""The command line. Nothing heavy is imported before a command needs it."""

import json
import shlex
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from secateur.commands import COMMANDS
from secateur.errors import InputError, RunError, nearest
from secateur.flags import (
    ALLOCATOR_KEY,
    METHOD_KEY,
    MethodCommand,
    calibration_options,
    field_options,
    judge_options,
    model_argument,
    open_options,
    text_options,
)
from secateur.typed import COMMAND
from secateur.version import __version__

if TYPE_CHECKING:
    from secateur.allocate.base import Allocator
    from secateur.evaluate.judge import Questions
    from secateur.goal import Goal
    from secateur.methods.base import Method
    from secateur.model import Settings
    from secateur.plan import Plan
    from secateur.text import Calibration
    from secateur.uses import Use

EXPORTS = ("gguf", "onnx", "plain")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="secateur")
def cli() -> None:
    """Make a trained transformer smaller and faster, and see what it costs.

    \b
    secateur compress Qwen/Qwen2.5-0.5B out --keep 0.8     do it
    secateur inspect Qwen/Qwen2.5-0.5B                     what could shrink
    secateur plan Qwen/Qwen2.5-0.5B --keep 0.8 --dry-run   what would shrink
    secateur eval out                                      measure any model
    """


@cli.command(name="ls")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
def list_all(as_json: bool) -> None:
    """List the methods with their options, and the model families they serve."""
    from secateur import present

    content = present.catalogue()
    _print_json(content) if as_json else present.show_catalogue(content)


@cli.command()
@model_argument
@open_options
@click.option("--multiple-of", default=8, show_default=True, type=click.IntRange(1))
@click.option(
    "--forms",
    is_flag=False,
    flag_value="all",
    metavar="[METHODS]",
    help="Error against bytes of the forms of these methods, by commas, or of all: needs weights.",
)
@text_options
def inspect(model: str, as_json: bool, multiple_of: int, forms: str | None, **rest: Any) -> None:
    """Show what can shrink in MODEL, and what calibration would need; reads no weights."""
    from secateur import present

    if forms is None:
        content = present.inspection(model, _settings(rest), multiple_of)
        _print_json(content) if as_json else present.show_inspection(content)
        return
    from secateur.evaluate.judge import quiet
    from secateur.methods.forms import Forms, reshaping
    from secateur.progress import for_terminal
    from secateur.spectrum import spectrum

    quiet()
    methods = Forms(of=",".join(reshaping()) if forms == "all" else forms)
    given = (_calibration(rest), _settings(rest), for_terminal())
    content = spectrum(model, methods, *given)
    _print_json(content) if as_json else present.show_spectrum(content)


@cli.command(cls=MethodCommand)
@model_argument
@calibration_options
@open_options
@click.option("--output", "-o", default="plan.json", show_default=True, help="File to write.")
@click.option("--dry-run", is_flag=True, help="Show the plan without writing it.")
@click.option("--overwrite", is_flag=True, help="Replace the file if it exists.")
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
    """Decide the size of every unit of MODEL; no weight is touched.

    The plan is JSON: read it, edit the sizes, apply it with `secateur compress --plan`. What
    calibration measured is kept, so a second budget takes seconds.
    """
    from tempfile import TemporaryDirectory

    from secateur import inputs, present
    from secateur.calibration import Store
    from secateur.evaluate.judge import quiet
    from secateur.opening import skeleton
    from secateur.prepare import check_reach, chosen_allocator, prepare
    from secateur.progress import for_terminal
    from secateur.stopwatch import Stopwatch
    from secateur.workspace import write_whole

    path = Path(output)
    if not dry_run and path.exists() and not overwrite:
        raise InputError(f"{output!r} exists; choose another --output or add --overwrite.")
    if not dry_run and not path.parent.is_dir():
        raise InputError(f"--output {output!r}: there is no folder {str(path.parent)!r}.")
    quiet()
    method, calibration, settings = _method(ctx, rest), _calibration(rest), _settings(rest)
    goal = _goal(ctx, rest)
    allocator = chosen_allocator(method, goal, _allocator(ctx, rest))
    shapes = skeleton(model, settings)
    _refuse_lengths(ctx, shapes.use)
    check_reach(shapes, method, goal, allocator)
    with TemporaryDirectory() as passing:
        made = prepare(
            model,
            method,
            calibration,
            inputs.read_calibration(model, calibration, settings),
            settings,
            goal,
            allocator,
            Store(statistics or Path(passing)),
            scores,
            Stopwatch(),
            for_terminal(),
            only_plan=True,
        ).plan
    if not dry_run:
        write_whole(path, made.to_json())
    if as_json:
        print(made.to_json(), end="")
    else:
        present.show_plan(made, None if dry_run else path)


@cli.command(cls=MethodCommand)
@model_argument
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--plan", "plan_file", type=click.Path(path_type=Path), help="Apply this plan.")
@click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    help="Follow the steps in this YAML file; --keep is then a share of the bytes of all blocks.",
)
@calibration_options
@judge_options
@open_options
@click.option("--overwrite", is_flag=True, help="Replace OUT once the new result is whole.")
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
    """Write a smaller checkpoint of MODEL (a folder or hub id) to the new folder OUT.

    The dense model is measured first, the result is reloaded in a fresh process, compared with
    memory and measured the same way. A run that was killed goes on when it is typed again.
    """
    from secateur import inputs, pipeline, present
    from secateur.evaluate.judge import quiet
    from secateur.opening import read_config
    from secateur.plan import read_plan
    from secateur.progress import for_terminal
    from secateur.uses import use_of

    quiet()
    if recipe is not None:
        _follow(ctx, model, out, recipe, as_json, overwrite, rest)
        return
    if plan_file is not None:
        _refuse_beside(ctx, "plan", {"keep", "calibration", "samples", "length", "seed"})
        made: Method | Plan = (replay := read_plan(plan_file))
        calibration, goal, allocator = replay.calibration.choice(), None, None
    else:
        made, calibration = _method(ctx, rest), _calibration(rest)
        goal, allocator = _goal(ctx, rest), _allocator(ctx, rest)
    use = use_of(read_config(model, _settings(rest)))
    _refuse_lengths(ctx, use)
    questions = _questions(rest, inputs.default_texts(calibration, use), calibration.length)
    report = pipeline.compress(
        model,
        out,
        made,
        calibration,
        questions,
        _settings(rest),
        goal,
        allocator,
        scores,
        statistics,
        overwrite,
        for_terminal(),
    )
    if as_json:
        _print_json(report.content)
    else:
        present.show_report(report, out)


@cli.command(name="eval")
@model_argument
@judge_options
@click.option("--against", metavar="DENSE", help="Measure this model too, and compare with it.")
@open_options
@click.pass_context
def evaluate(
    ctx: click.Context, /, model: str, as_json: bool, against: str | None, **rest: Any
) -> None:
    """Measure MODEL: perplexity, speed, memory and a sample, as `compress` does."""
    from dataclasses import asdict

    from secateur import present
    from secateur.evaluate.against import judge_against
    from secateur.evaluate.judge import check_tasks, judge_apart
    from secateur.opening import read_config
    from secateur.progress import for_terminal
    from secateur.text import BUNDLED, Text
    from secateur.uses import use_of

    _refuse_lengths(ctx, use := use_of(read_config(model, _settings(rest))))
    questions = _questions(rest, (Text("Python docs (bundled)", BUNDLED),), None)
    check_tasks(use, questions.tasks)
    if against is not None:
        report = judge_against(model, against, questions, _settings(rest), for_terminal())
        _print_json(report.content) if as_json else present.show_comparison(report)
        return
    verdict = judge_apart(model, questions, _settings(rest), for_terminal())
    _print_json(asdict(verdict)) if as_json else present.show_verdict(verdict)


@cli.command()
@model_argument
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--dense", is_flag=True, help="Multiply out every matrix of another form.")
@click.option(
    "--to",
    help="gguf: one file for llama.cpp, where it is run and compared; plain: classes of "
    "transformers itself, if all layers have the same shapes; onnx: a graph for onnxruntime.",
)
@click.option(
    "--type",
    "kind",
    default="auto",
    show_default=True,
    help="Of the matrices in a GGUF file: f32, f16, bf16, q8_0, q4_0, q4_k_m, q5_k_m or q6_k; auto "
    "is the stored format.",
)
@click.option("--no-tokenizer", is_flag=True, help="Leave the tokenizer out of a GGUF file.")
@click.option("--unchecked", is_flag=True, help="Don't run a GGUF file in llama.cpp.")
@open_options
@click.option("--overwrite", is_flag=True, help="Replace OUT once the new result is whole.")
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
    """Write MODEL, a compressed checkpoint, to OUT for readers that know less."""
    from dataclasses import asdict

    from secateur import present
    from secateur.evaluate.judge import quiet
    from secateur.export import export_dense, export_plain
    from secateur.progress import for_terminal

    if dense == (to is not None):
        raise InputError(
            "say what for: --dense multiplies out every matrix of another form, --to gguf writes a "
            "file for llama.cpp, --to plain a checkpoint for stock classes, --to onnx a graph."
        )
    if to not in (None, *EXPORTS):
        raise InputError(f"unknown --to {to!r}. {nearest(to, EXPORTS)}")
    for name in ("kind", "no_tokenizer", "unchecked"):
        if to != "gguf" and _typed(ctx, name):
            flag = {"kind": "type"}.get(name, name.replace("_", "-"))
            raise InputError(f"--{flag} is for --to gguf; leave it out.")
    quiet()
    if to == "gguf":
        from secateur.gguf.export import export_gguf

        given = (_settings(rest), overwrite, not no_tokenizer, not unchecked, for_terminal())
        made = export_gguf(model, out, kind, *given)
        _print_json({"out": str(out), **asdict(made)}) if as_json else present.show_gguf(out, made)
        return
    if to == "plain":
        plain = export_plain(model, out, _settings(rest), overwrite, for_terminal())
        _print_json({"out": str(out), **asdict(plain)}) if as_json else present.show_plain(
            out, plain.model_type
        )
        return
    if to == "onnx":
        from secateur.graph import export_onnx

        graph = export_onnx(model, out, _settings(rest), overwrite, for_terminal())
        _print_json({"out": str(out), **asdict(graph)}) if as_json else present.show_graph(
            out, graph
        )
        return
    tier = export_dense(model, out, _settings(rest), overwrite, for_terminal())
    if as_json:
        _print_json({"out": str(out), "tier": tier})
    else:
        present.show_export(out, tier)


for command in COMMANDS:
    cli.add_command(command)


def _settings(options: dict[str, Any]) -> "Settings":
    from secateur.model import Settings

    names = ("device", "dtype", "revision", "trust_remote_code")
    return Settings(**{name: options[name] for name in names})


def _method(ctx: click.Context, options: dict[str, Any]) -> "Method":
    kind: type[Method] = ctx.meta[METHOD_KEY]
    return kind(**_given(kind, options))


def _allocator(ctx: click.Context, options: dict[str, Any]) -> "Allocator | None":
    """What was asked for by name or by one of its fields."""
    kind: type[Allocator] = ctx.meta[ALLOCATOR_KEY]
    given = _given(kind, options)
    return kind(**given) if given or options["allocator"] else None


def _given(kind: type, options: dict[str, Any]) -> dict[str, Any]:
    from dataclasses import fields

    return {f.name: options[f.name] for f in fields(kind) if options.get(f.name) is not None}


def _goal(ctx: click.Context, options: dict[str, Any]) -> "Goal":
    from typing import get_args

    from secateur.goal import Goal
    from secateur.runtime import Runtime

    target, runtime = options["target"], options["runtime"]
    if target in get_args(Runtime):  # a runtime is a target, too, in another sense
        if _typed(ctx, "runtime") and runtime != target:
            raise InputError(f"--target {target} and --for {runtime}: one of them, not both.")
        target, runtime = None, target
    return Goal(
        target or ctx.meta[METHOD_KEY].target,
        options["tier"],
        options["multiple_of"],
        options["latency_batch"],
        options["latency_length"],
        runtime,
    )


def _calibration(options: dict[str, Any]) -> "Calibration":
    from secateur.text import Calibration

    return Calibration(
        options["calibration"],
        options["samples"],
        options["length"],
        options["seed"],
        options["select_calibration"],
    )


def _questions(options: dict[str, Any], default: Any, length: int | None) -> "Questions":
    from secateur.evaluate.judge import Questions
    from secateur.text import Text

    sources = list(dict.fromkeys(options["texts"]))
    names = [Path(source).name for source in sources]
    texts = tuple(
        Text(name if names.count(name) == 1 else source, source)
        for name, source in zip(names, sources, strict=True)
    )
    return Questions(
        texts=texts or default,
        length=options["eval_length"] or length,
        windows=options["eval_windows"],
        prompt=options["prompt"],
        new_tokens=options["new_tokens"],
        speed=not options["no_speed"],
        tasks=tuple(dict.fromkeys(t.strip() for g in options["tasks"] for t in g.split(",") if t)),
        task_limit=options["task_limit"],
        damage=options["damage"],
    )


def _follow(
    ctx: click.Context,
    model: str,
    out: Path,
    file: Path,
    as_json: bool,
    overwrite: bool,
    options: dict[str, Any],
) -> None:
    """Compress in the steps of a recipe."""
    from secateur import inputs, present
    from secateur.opening import read_config
    from secateur.progress import for_terminal
    from secateur.recipe import read_recipe
    from secateur.sequence import compress_in_steps
    from secateur.uses import use_of

    _refuse_beside(ctx, "recipe", {"plan_file", "scores", "statistics"})
    calibration, settings = _calibration(options), _settings(options)
    use = use_of(read_config(model, settings))
    _refuse_lengths(ctx, use)
    report = compress_in_steps(
        model,
        out,
        read_recipe(file, options["keep"]),
        calibration,
        _questions(options, inputs.default_texts(calibration, use), calibration.length),
        settings,
        overwrite,
        for_terminal(),
    )
    _print_json(report.content) if as_json else present.show_report(report, out)


def _refuse_beside(ctx: click.Context, what: str, also: set[str]) -> None:
    """A plan, or a recipe, has its own method and budget; a flag for them would be ignored."""
    kinds = (ctx.meta[METHOD_KEY], ctx.meta[ALLOCATOR_KEY])
    own = {option.name for kind in kinds for option in field_options(kind)}
    own |= {"method", "multiple_of", "target", "tier", "allocator", "runtime"}
    own |= {"latency_batch", "latency_length"} | also
    own |= {"select_calibration"} if what == "plan" else set()
    for name in sorted(str(n) for n in own):
        if _typed(ctx, name):
            flag = {"runtime": "for"}.get(name, name.removesuffix("_file").replace("_", "-"))
            raise InputError(f"--{flag} and --{what} exclude each other.")


def _refuse_lengths(ctx: click.Context, use: "Use") -> None:
    """An image has as many tokens as it has; a flag for their number would be ignored."""
    for name in ("length", "eval_length", "latency_length"):
        if not use.reads_text and _typed(ctx, name):
            raise InputError(
                f"--{name.replace('_', '-')}: this {use.what} reads images, whose number of tokens "
                f"the model sets; leave it out."
            )


def _typed(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=1))


def main() -> None:
    """Entry point: one message and exit code 2 for anything the user can put right."""
    COMMAND.set(shlex.join(["secateur", *sys.argv[1:]]))
    warnings.formatwarning = lambda message, *_, **__: f"note: {message}\n"
    try:
        code = cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        code = 130
        print("interrupted; a compress command goes on when it is typed again.", file=sys.stderr)
    except click.ClickException as error:
        if isinstance(error, click.UsageError) and error.ctx is not None:
            print(error.ctx.get_usage(), file=sys.stderr)
        print(f"error: {error.format_message()}", file=sys.stderr)
        code = error.exit_code
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except OSError as error:
        print(f"error: {error}. Nothing was left half-written.", file=sys.stderr)
        code = 2
    sys.exit(code)
