"""What was typed, as the objects that the library takes."""

import contextlib
import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from secateur.cli.options import ALLOCATOR_KEY, METHOD_KEY, field_options
from secateur.structure.budget import Budget, Runtime, flag_of, key_of
from secateur.utils.errors import InputError

if TYPE_CHECKING:
    from secateur.allocate.base import Allocator
    from secateur.data.tasks import Use
    from secateur.data.tokens import Calibration
    from secateur.distributed.collectives import Ranks
    from secateur.evaluate.measurements import Questions
    from secateur.methods.base import Method
    from secateur.models.model import Settings
    from secateur.pipeline.context import RunContext


@dataclass(frozen=True)
class Invocation:
    """What a command knows beside its options.

    Attributes:
        command: the command line, as it was typed.
        ranks: the processes that run it; None where there is one.
    """

    command: str
    ranks: "Ranks | None" = None


def settings(options: dict[str, Any]) -> "Settings":
    """How to open a model."""
    from secateur.models.model import Settings

    names = ("device", "dtype", "revision", "trust_remote_code", "stream")
    return Settings(**{name: options[name] for name in names if name in options})


def method(ctx: click.Context, options: dict[str, Any]) -> "Method":
    """The method with the options that were given."""
    kind: type[Method] = ctx.meta[METHOD_KEY]
    return kind(**_given(kind, options))


def allocator(ctx: click.Context, options: dict[str, Any]) -> "Allocator | None":
    """What was asked for by name or by one of its fields."""
    kind: type[Allocator] = ctx.meta[ALLOCATOR_KEY]
    given = _given(kind, options)
    return kind(**given) if given or options["allocator"] else None


def _given(kind: type, options: dict[str, Any]) -> dict[str, Any]:
    return {f.name: options[f.name] for f in fields(kind) if options.get(f.name) is not None}


def budget(ctx: click.Context, options: dict[str, Any]) -> "Budget":
    """What to spend; a runtime that is named as the target is what will read the result."""
    given = {f.name: options[key_of(f)] for f in fields(Budget)}
    target = given["target"]
    if target in get_args(Runtime):  # a runtime is a target, too, in another sense
        if typed(ctx, "runtime") and given["runtime"] != target:
            raise InputError(
                f"--target {target} and --for {given['runtime']}: one of them, not both."
            )
        given |= {"target": None, "runtime": target}
    return Budget(**given)


def calibration(options: dict[str, Any]) -> "Calibration":
    """The text that decides."""
    from secateur.data.tokens import Calibration

    return Calibration(
        options["calibration"],
        options["samples"],
        options["length"],
        options["seed"],
        options["select_calibration"],
    )


def questions(options: dict[str, Any], default: Any, length: int | None) -> "Questions":
    """What to measure; ``default`` are the texts where none is given."""
    from secateur.data.tokens import Text
    from secateur.evaluate.measurements import Questions

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
        tasks=tuple(dict.fromkeys(t for given in options["tasks"] for t in _tasks(given))),
        task_limit=options["task_limit"],
        damage=options["damage"],
    )


def _tasks(given: str) -> list[str]:
    """Names and files by commas, or one file, whose path may have some."""
    from secateur.data.tokens import expanded

    with contextlib.suppress(OSError):  # many names together are too long for a path
        if expanded(given).is_file():
            return [given]
    return [name.strip() for name in given.split(",") if name.strip()]


def refuse_beside(ctx: click.Context, what: str, also: set[str]) -> None:
    """A plan, or a recipe, has its own method and budget; a flag for them would be ignored."""
    kinds = (ctx.meta[METHOD_KEY], ctx.meta[ALLOCATOR_KEY])
    own = {option.name for kind in kinds for option in field_options(kind)}
    flags = {key_of(f): flag_of(f) for f in fields(Budget)}
    own |= {"method", "allocator", *flags} | also
    own |= {"select_calibration"} if what == "plan" else set()
    own -= {"keep"} if what == "recipe" else set()  # which is that of all steps together
    for name in sorted(str(n) for n in own):
        if typed(ctx, name):
            flag = flags.get(name, name.removesuffix("_file").replace("_", "-"))
            raise InputError(f"--{flag} and --{what} exclude each other.")


def refuse_lengths(ctx: click.Context, use: "Use") -> None:
    """An image has as many tokens as it has; a flag for their number would be ignored."""
    for name in ("length", "eval_length", "latency_length"):
        if not use.reads_text and typed(ctx, name):
            raise InputError(
                f"--{name.replace('_', '-')}: this {use.what} reads images, whose number of tokens "
                f"the model sets; leave it out."
            )


def typed(ctx: click.Context, name: str) -> bool:
    """Whether an option was given on the command line."""
    return ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def print_json(content: Any) -> None:
    """Print for machines."""
    print(json.dumps(content, indent=1))


def context(ctx: click.Context) -> "RunContext":
    """Who is told, who helps, and the command that was typed."""
    from secateur.pipeline.context import RunContext
    from secateur.utils.progress import for_terminal

    invocation: Invocation = ctx.obj
    found = RunContext(for_terminal(), command=invocation.command)
    return found if invocation.ranks is None else replace(found, ranks=invocation.ranks)
