"""The package's structure: what may import what, and how large things may be."""

import ast
import re
from collections import defaultdict
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "secateur"
#: each room may import those before it, and itself
ROOMS = (
    *("utils", "layers", "families", "io", "linalg", "structure", "data", "models", "distributed"),
    *("calibration", "allocate", "methods", "apply", "scoring", "planning", "evaluate", "report"),
    *("export", "pipeline", "sweeps", "cli"),
)
CROWDED = 14  # modules of a room, but for those with one file per paper or strategy
FLAT = {"methods", "allocate"}
ROOT = {"__init__", "__main__", "version", "extend"}
LINES, BODY, ARGUMENTS = 400, 60, 5


@cache
def trees():
    """Dotted name of each module, with its syntax tree."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text())
    return found


def for_types_alone(node):
    """Whether what stands below is there for type checkers only."""
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(name):
    """The package's modules that a module imports, inside its functions too."""
    known, found, waiting = trees(), set(), [trees()[name]]
    while waiting:
        node = waiting.pop()
        if for_types_alone(node):
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            home = name.rpartition(".")[0] + "." if node.level else ""  # run-time layers alone
            whole = {f"{home}{node.module}.{alias.name}" for alias in node.names}
            found |= {m if m in known else m.rpartition(".")[0] for m in whole}
        waiting += ast.iter_child_nodes(node)
    return {module for module in found if module.split(".")[0] == "secateur"}


def room(name):
    """The room of a module, or None for the root."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else None


def test_every_folder_is_a_room():
    folders = {p.parent.relative_to(PACKAGE).parts[0] for p in PACKAGE.rglob("*/*.py")}
    assert folders == set(ROOMS)


def test_the_root_is_nearly_empty():
    assert {path.stem for path in PACKAGE.glob("*.py")} <= ROOT


@pytest.mark.parametrize("name", [name for name in sorted(trees()) if room(name)])
def test_no_import_upwards(name):
    here = room(name)
    upwards = {m for m in imports(name) if room(m) and ROOMS.index(room(m)) > ROOMS.index(here)}
    outside = {m for m in imports(name) if room(m) is None and m not in ("secateur", VERSION)}
    assert not upwards | outside


VERSION = "secateur.version"


def test_no_cycle():
    """Not between modules either; a package counts as its ``__init__``."""
    TopologicalSorter({name: imports(name) - {name, "secateur"} for name in trees()}).prepare()


@pytest.mark.parametrize("here", ROOMS)
def test_a_room_says_what_it_is(here):
    said = ast.get_docstring(trees()[f"secateur.{here}"]) or ""
    assert "ay import" in said, "what it may import"
    modules = [name for name in trees() if name.startswith(f"secateur.{here}.")]
    direct = [name for name in modules if name.count(".") == 2]
    assert here in FLAT or len(direct) <= CROWDED
    assert max(name.count(".") for name in modules) <= 3, "rooms are at most two levels deep"


@pytest.mark.parametrize("name", sorted(trees()))
def test_files_functions_and_calls_are_short(name):
    tree = trees()[name]
    length = max((getattr(node, "end_lineno", 0) or 0) for node in ast.walk(tree))
    assert length <= LINES
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < BODY, f"{node.name} is long"
        if isinstance(node, ast.Call):
            assert len(node.args) <= ARGUMENTS, f"line {node.lineno}: name the arguments"


def test_public_classes_have_names_of_their_own():
    homes = defaultdict(list)
    for name, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(name)
    assert {name: places for name, places in homes.items() if len(places) > 1} == {}


def test_the_architecture_page_names_every_module_once():
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    modules = page[page.index("## The modules") : page.index("## Decisions")]
    named = re.findall(r"`([a-z0-9_]+(?:/[a-z0-9_]+)+\.py)`", modules)
    paths = (path.relative_to(PACKAGE) for path in PACKAGE.rglob("*/*.py"))
    assert sorted(named) == sorted(str(path) for path in paths if path.stem != "__init__")
