"""Options that several commands share, and options made from the fields of a method."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from secateur.structure.budget import LEAST, Budget, Keep, flag_of, key_of
from secateur.utils.errors import InputError

if TYPE_CHECKING:
    from secateur.allocate.base import Allocator
    from secateur.methods.base import Method

DEFAULT_METHOD = "auto"
METHOD_KEY = "secateur.method"
ALLOCATOR_KEY = "secateur.allocator"


class MethodCommand(click.Command):
    """A command that has the options of its method and its allocator in addition to its own.

    Importing a method imports torch, so ``--help`` shows these options only if a method is named.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Find the method first, because its options must be known before the rest is parsed."""
        parser = self.make_parser(ctx)
        parser.ignore_unknown_options = True  # those of the method, which are not known yet
        given = parser.parse_args(list(args))[0]
        if {"method", "allocator"} & given.keys() or not set(args) & set(ctx.help_option_names):
            from secateur.allocate import allocator_class
            from secateur.methods import method_class

            method = method_class(given.get("method", DEFAULT_METHOD))
            asked = given.get("allocator")
            ctx.meta[METHOD_KEY] = method
            ctx.meta[ALLOCATOR_KEY] = allocator_class(asked) if asked else type(method().allocator)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            name = error.option_name
            if not (owners := owners_of(name)):
                raise
            kinds = (("method", METHOD_KEY), ("allocator", ALLOCATOR_KEY))
            now = [f"{what} {ctx.meta[key].name}" for what, key in kinds if key in ctx.meta]
            message = f"{name} belongs to {owners}, not to {' or '.join(now) or 'the command'}. "
            message += f"Choose that one, or leave {name} out."
            raise click.NoSuchOption(name, message, ctx=ctx) from error

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Options of the command, the method and the allocator."""
        found = super().get_params(ctx)
        for what, key in (("method", METHOD_KEY), ("allocator", ALLOCATOR_KEY)):
            if (kind := ctx.meta.get(key)) is not None:
                added = field_options(kind)
                taken = {flag for parameter in found for flag in parameter.opts}
                if double := taken & {flag for option in added for flag in option.opts}:
                    raise InputError(
                        f"{what} {kind.name!r}: its option {min(double)} has the name of "
                        f"another option of this command; its package must rename the field."
                    )
                found = [*found, *added]
        return found

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Say how to show the options of a method, unless they are shown."""
        if METHOD_KEY not in ctx.meta:
            with formatter.indentation():
                formatter.write_paragraph()
                formatter.write_text(
                    f"Each method has more options. `--method {DEFAULT_METHOD} --help` shows those "
                    f"of one method, and `secateur ls` lists all methods."
                )


def field_options(kind: "type[Method] | type[Allocator] | None") -> list[click.Parameter]:
    """Options made from the fields of a method or allocator."""
    if kind is None:
        return []
    return [
        click.Option(
            [f"--{field.name.replace('_', '-')}"],
            type=type(field.default),
            help=f"[{kind.name}] {field.metadata['help']}  [default: {shown(field.default)}]",
        )
        for field in fields(kind)
    ]


def owners_of(option: str) -> str:
    """The methods and allocators that have an option, as text; empty if there are none."""
    from secateur import allocate, methods

    found = []
    for what, registry in (("method", methods.REGISTRY), ("allocator", allocate.REGISTRY)):
        kinds = registry.survey()[0].items()
        having = [n for n, kind in kinds if any(option in o.opts for o in field_options(kind))]
        found += [f"{what} {' or '.join(having)}"] if having else []
    return " or ".join(found)


def shown(value: Any) -> str:
    """The value of an option as text."""
    return value if isinstance(value, str) else f"{value:g}"


def stacked(decorators: Sequence[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    """Combine several decorators, so that commands can share a group of options."""

    def decorate(function: Any) -> Any:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


model_argument = click.argument("model")

open_options = stacked(
    [
        click.option(
            "--device",
            default="auto",
            show_default=True,
            help="Device: auto, cpu, cuda, cuda:1, mps, …",
        ),
        click.option(
            "--dtype",
            default="auto",
            show_default=True,
            help="Number format to compute in; auto is float32 on a CPU, else the stored format.",
        ),
        click.option("--revision", help="Branch, tag or commit of a model on the hub."),
        click.option(
            "--trust-remote-code",
            is_flag=True,
            help="Run the Python code that comes with the checkpoint.",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
    ]
)

stream_option = click.option(
    "--stream",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    help="Read the model from disk block by block; auto does this if the model would take over "
    "half of the free memory.",
)

text_options = stacked(
    [
        click.option(
            "--calibration",
            default="bundled",
            show_default=True,
            help="Calibration data: a .txt file, a folder, a .jsonl file with a "
            '"text" field, a Hugging Face dataset (NAME[:CONFIG[:SPLIT]]), or "bundled".',
        ),
        click.option(
            "--samples",
            default=128,
            show_default=True,
            type=click.IntRange(1),
            help="Number of calibration windows.",
        ),
        click.option(
            "--length",
            default=256,
            show_default=True,
            type=click.IntRange(2),
            help="Tokens per calibration window.",
        ),
        click.option(
            "--seed",
            default=0,
            show_default=True,
            type=click.IntRange(-(2**63), 2**63 - 1),
            help="Seed of the choice of windows.",
        ),
        click.option(
            "--select-calibration",
            default="none",
            show_default=True,
            help="How to choose the windows: none (at random), kl (the one of several random sets "
            "whose compressed model is closest to the dense one), leverage (windows with tokens "
            "that other windows do not explain), dpp (windows that differ from each other).",
        ),
    ]
)


def share(text: str) -> Keep:
    """Parse a number, or the word for as little as possible.

    Raises:
        ValueError: it is neither.
    """
    return LEAST if text == LEAST else float(text)


def type_of(field: Any) -> Any:
    """The type of the option of a budget field."""
    if field.name == "keep":
        return share
    low = field.metadata.get("low")
    return click.STRING if low is None else click.IntRange(low)


def _budget_option(field: Any) -> Callable[[Any], Any]:
    """The option of a budget field."""
    usual, help_text = field.metadata.get("usual"), field.metadata["help"]
    return click.option(
        f"--{flag_of(field)}",
        key_of(field),
        type=type_of(field),
        default=field.default,
        show_default=usual is None,
        help=help_text if usual is None else f"{help_text}  [default: {usual}]",
    )


budget_options = stacked([_budget_option(field) for field in fields(Budget)])

calibration_options = stacked(
    [
        click.option(
            "--method",
            "-m",
            default=DEFAULT_METHOD,
            show_default=True,
            help="Compression method; `secateur ls` lists all.",
        ),
        budget_options,
        click.option(
            "--allocator",
            help="How the budget is distributed over units; `secateur ls` lists all allocators  "
            "[default: the method's]",
        ),
        click.option(
            "--scores",
            type=click.Path(path_type=Path, dir_okay=False),
            help="File to read the units' scores from, or to write them to  [default: a cache]",
        ),
        click.option(
            "--statistics",
            type=click.Path(path_type=Path, file_okay=False),
            help="Folder to read calibration statistics from, or to write them to.",
        ),
        text_options,
    ]
)

judge_options = stacked(
    [
        click.option(
            "--eval",
            "texts",
            multiple=True,
            metavar="TEXT",
            help="Text to evaluate on, given like --calibration; can be repeated  [default: a "
            "held-out part of the calibration text, and the bundled text]",
        ),
        click.option(
            "--eval-length",
            type=click.IntRange(2),
            help="Tokens per evaluation window  [default: that of calibration, or 256]",
        ),
        click.option(
            "--eval-windows",
            default=256,
            show_default=True,
            type=click.IntRange(1),
            help="Maximum number of evaluation windows per text.",
        ),
        click.option(
            "--prompt",
            help="Prompt of the generated sample  [default: the beginning of the first text]",
        ),
        click.option(
            "--new-tokens",
            type=click.IntRange(1),
            help="Tokens of the generated sample  [default: 40]",
        ),
        click.option("--no-speed", is_flag=True, help="Do not measure speed."),
        click.option(
            "--tasks",
            multiple=True,
            metavar="TASKS",
            help="Tasks to evaluate on, separated by commas: task files (.jsonl, see "
            "docs/evaluation.md), or names of lm-evaluation-harness, such as arc_easy,piqa; can be "
            "repeated.",
        ),
        click.option(
            "--task-limit",
            type=click.IntRange(2),
            help="Maximum number of items per task  [default: all]",
        ),
        click.option(
            "--damage",
            is_flag=True,
            help="Also measure what perplexity does not show: expected calibration error, "
            "repetition, recall of planted keys, accuracy of each class.",
        ),
    ]
)
