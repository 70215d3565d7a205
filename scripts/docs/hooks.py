"""What mkdocs calls: pages from the source, pages from outside docs/, and the order of them all."""

import posixpath
import re
from typing import Any

from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files

from scripts.docs import methods, reference
from scripts.docs.links import ROOT, for_site, links, place, target

log = get_plugin_logger(__name__)

#: pages by section; those that aren't there are left out, and others come last in the last one
ORDER = {
    "Start": ["README", "project", "quickstart", "how-to-choose", "glossary", "footguns"],
    "Guides": [
        *("families", "calibration", "forms", "recipes", "sweeps", "encoders", "encoder-decoder"),
        *("evaluation", "reports", "gguf", "serving", "security"),
    ],
    "Methods": ["methods/auto", "methods/modegpt", "methods/allocation", "methods/*"],
    "Reference": ["command-line", "python", "checkpoint-format", "results"],
    "Inside": ["architecture", "extending", "CONTRIBUTING", "CHANGELOG", "*"],
}
#: pages of the repository that are on the site though no page may link to them
ALSO = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/RESULTS.md")
#: where a page on the site is from, as the repository has it
sources: dict[str, str] = {}


def on_files(files: Files, config: Any) -> Files:
    """Add what isn't in docs/, and put the pages in order."""
    files.append(File.generated(config, "command-line.md", content=reference.command_line()))
    files.append(File.generated(config, "python.md", content=reference.python()))
    waiting = list(ALSO)
    for page in files.documentation_pages():
        sources[page.src_uri] = f"docs/{page.src_uri}"
        waiting += outside(page.content_string, f"docs/{page.src_uri}")
    while waiting:
        path = waiting.pop()
        if files.get_file_from_path(place(path)) or not (ROOT / path).is_file():
            continue
        files.append(File.generated(config, place(path), abs_src_path=str(ROOT / path)))
        sources[place(path)] = path
        if path.endswith(".md"):
            waiting += outside((ROOT / path).read_text(), path)
    config.nav = nav([page.src_uri for page in files.documentation_pages()])
    return files


def outside(text: str, page: str) -> list[str]:
    """What a page links to outside docs/."""
    paths = (target(link, page)[0] for link in links(text))
    return [path for path in paths if not path.startswith(("docs/", "../"))]


def nav(pages: list[str]) -> list[dict[str, list[str]]]:
    """The pages by section."""
    left = {page.removesuffix(".md"): page for page in sorted(pages)}
    sections: dict[str, list[str]] = {name: [] for name in ORDER}
    for last in (False, True):  # names first, so that they are not taken by a pattern
        for name, wanted in ORDER.items():
            for one in (w for w in wanted if w.endswith("*") == last):
                parent = posixpath.dirname(one)
                found = [p for p in left if posixpath.dirname(p) == parent] if last else [one]
                sections[name] += [left.pop(p) for p in found if p in left]
    sections[name] += left.values()
    return [{name: own} for name, own in sections.items()]


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Add what the source says of a method; make links those of the site."""
    path = sources[page.file.src_uri]
    if path.startswith("docs/methods/"):
        markdown += methods.section(ROOT / path)
    return for_site(markdown, path)


def on_post_page(output: str, page: Any, **_: Any) -> None:
    """Nothing on a page may come from another host; a warning fails a strict build."""
    for found in re.findall(
        r'<(?:script|link|img|iframe)[^>]*\s(?:src|href)="https?:[^>]*>', output
    ):
        log.warning("%s loads from another host: %s", page.file.src_uri, found)
