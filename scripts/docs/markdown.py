"""Markdown from what the package says of itself: tables, and docstrings in Google style."""

import inspect
import re
from collections.abc import Iterable, Sequence

SECTIONS = ("Args", "Attributes", "Raises", "Returns", "Yields")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose cells may hold any text."""
    lines = [head, ["---"] * len(head), *([cell(text) for text in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cell(text: str) -> str:
    """Text that stays in its cell."""
    return " ".join(text.split()).replace("|", "\\|")


def docstring(thing: object) -> str:
    """The docstring of a class or function; empty where it has none of its own."""
    found = thing.__doc__ or ""
    if found.startswith(f"{getattr(thing, '__name__', '')}("):  # what a dataclass is given
        return ""
    return prose(inspect.cleandoc(found))


def prose(text: str) -> str:
    """Roles and double backquotes as code, sections as lists; indented formulas stay code."""
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text)
    text = re.sub(r"``(.+?)``", r"`\1`", text)
    paragraphs = re.split(r"\n\n+", text)
    return "\n\n".join(map(section, paragraphs))


def section(paragraph: str) -> str:
    """A paragraph; one that begins with the name of a section becomes a list."""
    head, _, body = paragraph.partition("\n")
    if head.rstrip(":") not in SECTIONS or not head.endswith(":"):
        return paragraph
    body = inspect.cleandoc("\n" + body)
    entries = re.split(r"\n(?! )", body)
    lines = [" ".join(entry.split()) for entry in entries]
    items = [re.sub(r"^\*{0,2}([\w.]+): ", r"- `\1`: ", line) for line in lines]
    return f"**{head.rstrip(':')}**\n\n" + "\n".join(items)
