"""Relative links of the documentation, between pages and out of docs/."""

import os.path
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
#: pages outside docs/ whose place on the site is another than in the repository
MOVED = {"README.md": "project.md", "benchmarks/RESULTS.md": "results.md"}


def prose_lines(text: str) -> Iterator[tuple[str, bool]]:
    """The lines of a page, each with whether it is prose, not code between fences."""
    fence = ""
    for line in text.splitlines(keepends=True):
        opens = re.match(r"\s*(```+|~~~+)", line)
        if opens and not fence:
            fence = opens[1]
        elif opens and line.strip() == fence:
            yield line, False
            fence = ""
            continue
        yield line, not fence


def replaced(text: str, new: Callable[[str], str]) -> str:
    """The page with every relative link, with its anchor, put through ``new``."""

    def other(found: re.Match[str]) -> str:
        return found[1] + (found[2] if external(found[2]) else new(found[2])) + found[3]

    return "".join(LINK.sub(other, line) if prose else line for line, prose in prose_lines(text))


def links(text: str) -> list[str]:
    """The relative links of a page."""
    found: list[str] = []
    replaced(text, lambda link: found.append(link) or link)  # type: ignore[func-returns-value]
    return found


def external(link: str) -> bool:
    """Whether a link has a scheme."""
    return bool(re.match(r"[a-z]+:", link))


def target(link: str, page: str) -> tuple[str, str]:
    """Path in the repository, and anchor, of what a page of the repository links to."""
    path, _, anchor = link.partition("#")
    if not path:
        return page, anchor
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), path)), anchor


def place(path: str) -> str:
    """Where a file of the repository is on the site."""
    return path.removeprefix("docs/") if path.startswith("docs/") else MOVED.get(path, path)


def for_site(text: str, page: str) -> str:
    """The text of a page of the repository with its links as they are on the site."""
    start = posixpath.dirname(place(page)) or "."

    def moved(link: str) -> str:
        if link.startswith("#"):
            return link
        path, anchor = target(link, page)
        there = os.path.relpath(place(path), start)
        return f"{there}#{anchor}" if anchor else there

    return replaced(text, moved)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as Git hosts and the site make them."""
    found: set[str] = set()
    for line, prose in prose_lines(text):
        if prose and (heading := re.match(r"#{1,6}\s+(.*)", line)):
            slug = base = slug_of(heading[1])
            count = 0
            while slug in found:
                count += 1
                slug = f"{base}-{count}"
            found.add(slug)
    return found


def slug_of(heading: str) -> str:
    """A heading as an anchor."""
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
