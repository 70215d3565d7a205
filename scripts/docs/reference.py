"""The pages about the command line and the Python names, from what both say of themselves."""

import inspect
import re
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

import click

import secateur
from scripts.docs.markdown import docstring, prose, table
from scripts.docs.methods import page_of
from secateur.allocate import ALLOCATORS, allocator_class
from secateur.cli.main import cli
from secateur.methods import METHODS, method_class

COMMANDS = """\
# Command line

What `secateur COMMAND --help` says. Methods and allocators have options of their own, which `plan`
and `compress` take beside these: they are on the [methods' pages](README.md) and under
`secateur compress --method NAME --help`.

Anything that can be put right ends with one message and exit code 2, a run that failed with 1.

"""
NAMES = """\
# Python

Everything here is imported from `secateur`. The first use of a name loads what it needs; importing
the package loads neither torch nor transformers. Mistakes of the caller raise `InputError`.

"""


def command_line() -> str:
    """The page about the commands, from the parser itself."""
    # A command remembers its help option as the first context names it.
    context = click.Context(cli, info_name="secateur", **cli.context_settings)
    return COMMANDS + "\n".join(
        command(click.Context(one, info_name=name, parent=context), one)
        for name, one in cli.commands.items()
    )


def command(context: click.Context, one: click.Command) -> str:
    """A command: usage, help and options."""
    usage = " ".join(one.collect_usage_pieces(context))
    rows = []
    for option in one.params:
        record = option.get_help_record(context)
        if record is not None and option.param_type_name == "option":
            rows.append([f"`{record[0]}`", angles(record[1])])
    return (
        f"## {context.info_name}\n\n```\n{context.command_path} {usage}\n```\n\n"
        f"{paragraphs(one.help or '')}\n\n" + table(["option", "meaning"], rows)
    )


def paragraphs(text: str) -> str:
    """Help text; what click keeps line by line is code."""
    parts = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(
        f"```\n{part.removeprefix(chr(8)).strip()}\n```" if part.startswith("\b") else prose(part)
        for part in parts
    )


def angles(text: str) -> str:
    """Text with brackets and stars as they are."""
    return re.sub(r"([\[\]*<_])", r"\\\1", text)


def python() -> str:
    """The page about the public names."""
    methods = {method_class(name).__name__: name for name in METHODS}
    allocators = {allocator_class(name).__name__: name for name in ALLOCATORS}
    rest = sorted(n for n in secateur.__all__ if n not in {**methods, **allocators})
    functions = [n for n in rest if inspect.isfunction(getattr(secateur, n))]
    classes = [n for n in rest if inspect.isclass(getattr(secateur, n))]
    return (
        NAMES
        + "## Functions\n\n"
        + "\n".join(map(function, functions))
        + "\n## Classes\n\n"
        + "\n".join(map(described, classes))
        + "\n## Methods by name\n\nTheir fields are their options.\n\n"
        + table(["class", "name", "what it does"], [named(c, n) for c, n in methods.items()])
        + "\n## Allocators by name\n\nSee [allocation](methods/allocation.md).\n\n"
        + table(
            ["class", "name", "what it does"],
            [[f"`{c}`", f"`{n}`", allocator_class(n).summary] for c, n in allocators.items()],
        )
    )


def named(kind: str, name: str) -> list[str]:
    """A method's row."""
    page = f"methods/{page_of(name).name}#reference-{name}"
    return [f"[`{kind}`]({page})", f"`{name}`", method_class(name).summary]


def function(name: str) -> str:
    """A function: how it is called, and what it says."""
    found = getattr(secateur, name)
    return f"### {name}\n\n```python\n{signature(name, found)}\n```\n\n{docstring(found)}\n"


def described(name: str) -> str:
    """A class: how it is made, what it says, and its public methods."""
    found = getattr(secateur, name)
    lines = [f"### {name}\n\n```python\n{signature(name, found)}\n```\n\n{docstring(found)}\n"]
    for member, value in vars(found).items():
        plain = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        if member.startswith("_") or not inspect.isfunction(plain) or not plain.__doc__:
            continue
        text = f"```python\n{signature(member, plain)}\n```\n\n{docstring(plain)}"
        lines.append(f"#### {name}.{member}\n\n{text}\n")
    return "\n".join(lines)


def signature(name: str, found: Any) -> str:
    """A call as Python has it, a line a parameter where one line is too short."""
    if inspect.isclass(found) and issubclass(found, Exception):
        return f"{name}(message)"
    parameters = [
        parameter(one, found)
        for one in inspect.signature(found).parameters.values()
        if one.name != "self"
    ]
    gives = inspect.signature(found).return_annotation
    known = inspect.isfunction(found) and gives is not inspect.Signature.empty
    ending = f" -> {annotated(gives)}" if known else ""
    line = f"{name}({', '.join(parameters)}){ending}"
    if len(line) <= 80:
        return line
    return f"{name}(\n" + "".join(f"    {one},\n" for one in parameters) + f"){ending}"


def parameter(one: inspect.Parameter, owner: Any) -> str:
    """One parameter with its type and default."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    text = stars.get(one.kind, "") + one.name
    if one.annotation is not inspect.Parameter.empty:
        text += f": {annotated(one.annotation)}"
    if one.default is inspect.Parameter.empty:
        return text
    return f"{text} = {default(one, owner)}"


def default(one: inspect.Parameter, owner: Any) -> str:
    """A default that is the same on every machine; of a factory, the call."""
    if is_dataclass(owner):
        made = {f.name: f.default_factory for f in fields(owner)}.get(one.name, MISSING)
        if made is not MISSING:
            return f"{getattr(made, '__name__', 'made')}()"
    if one.default is None or isinstance(one.default, (bool, int, float, str, tuple)):
        return repr(one.default)
    if is_dataclass(one.default):
        return f"{type(one.default).__name__}()"
    return "…"


def annotated(kind: Any) -> str:
    """A type in few words."""
    text = kind if isinstance(kind, str) else inspect.formatannotation(kind)
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", text)
