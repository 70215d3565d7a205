"""Every command and every block of code that the pages show is read, and runs.

The blocks of a page are followed from the top, in a folder of its own and in the tests' process,
with small stand-ins for what a reader has. The fast run follows the pages of QUICK and reads the
others: their options have to exist, their code to compile, and what it imports to be there.
"""

import ast
import contextlib
import importlib
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
import yaml
from conftest import ROOT, SMALL, sentences

from secateur.cli.main import cli

#: docs/extending.md has tests of its own, which write its files and run them
PAGES = ["README.md", *sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("docs/**/*.md"))]
PAGES.remove("docs/extending.md")
QUICK = ("README.md", "docs/quickstart.md")

#: what is read and not run, by a part of it, and why
NOT_RUN = {
    "arc_easy": "asks the hub for the questions of a benchmark",
    "secateur push": "writes to the hub",
    "--ray": "needs a cluster",
    "torchrun": "needs as many devices as ranks; tests/cli/test_cli_ranks.py runs two",
    "YOUR_": "tests/cli/test_cli_encoders.py and test_cli_seq2seq.py run these",
    "secateur sweep sweep.yaml": "tests/cli/test_cli_sweep.py runs a file like it",
    "…": "is no command, but a pattern of some",
    " ...": "is no command, but a pattern of some",
    "[--": "is no command, but a pattern of some",
    "llama-cli": "is a program of llama.cpp",
    "pip install": "installs from an index of packages",
    "python3 -m venv": "makes an environment",
    "activate": "enters that environment",
    "git clone": "needs a network",
    "cd ": "enters a clone",
    "make ": "builds an environment first",
    "-m http.server": "serves until it is stopped",
    "python benchmarks/": "takes hours, or data that is not in the repository",
    "python -m tests.fuzz": "takes hours; tests/fuzz has tests of its own",
}
#: code that is an excerpt, by a part of it, and why
NOT_EXECUTED = {
    "allocator=SPDY()": "goes on from names of the quickstart",
    "AutoModelForMaskedLM": "opens results of commands that are not run",
}
#: what stands for a model that a reader has
MODELS = re.compile(r"MODEL|LARGE|demo|[A-Z][\w.-]*/[A-Z][\w.-]+")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """Its command lines, whole, without prompts and comments."""
        if self.language not in ("", "sh", "bash", "console", "shell"):
            return []
        lines = [line.removeprefix("$ ") for line in self.text.replace("\\\n", " ").splitlines()]
        whole = [" ".join(shlex.split(line, comments=True)) for line in lines if typed(line)]
        return [line for line in whole if line]


STARTS = r"(?:\w+=\S+ )*(?:secateur|torchrun|pip|python3?|\.venv/\S+|make|git|cd|llama-cli|\.) "


def typed(line: str) -> bool:
    return re.match(STARTS, line + " ") is not None


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.finditer(r"^```([\w-]*)\n(.*?)^```$", text, re.S | re.M)
    return [Block(page, text[: m.start()].count("\n") + 1, m[1], m[2]) for m in found]


ALL = [block for page in PAGES for block in blocks(page)]


def reason(text: str, table: dict[str, str]) -> str | None:
    return next((why for part, why in table.items() if part in f"{text} "), None)


def given(args: list[str], model: Path, page: str) -> list[str]:
    """The arguments with small stand-ins, and what keeps so small a run quick."""
    first, *rest = args
    own = [str(model) if MODELS.fullmatch(arg) else arg for arg in rest]
    if first in ("compress", "eval", "sweep"):
        judged = SMALL[:1] + SMALL[5:]
        own += [option for option in judged if option not in own]
    if (first in ("compress", "plan", "sweep") and "--plan" not in own) or "--forms" in own:
        sized = [option for option in own if option in ("--samples", "--length")]
        for option in reversed(sized):  # the page's are those of a real model
            del own[own.index(option) : own.index(option) + 2]
        own += ["--samples", "4", "--length", "32"]
    if "gptq" in own:
        own += ["--group", "16"]  # of which the rows of so small a model are multiples
    return [first, *own]


# Read


def test_blocks_are_found():
    page = "text\n```sh\nsecateur ls  # all\n$ secateur plan M \\\n  --keep 0.5\n```\n"
    page += "```\nas shown\n```\n"
    found = re.finditer(r"^```([\w-]*)\n(.*?)^```$", page, re.S | re.M)
    first, second = [Block("p", 1, m[1], m[2]) for m in found]
    assert first.commands == ["secateur ls", "secateur plan M --keep 0.5"]
    assert second.commands == []
    assert len(ALL) > 20
    assert sum(len(block.commands) for block in ALL) > 20


@pytest.mark.parametrize("page", PAGES)
def test_commands_have_the_options_that_the_page_gives_them(page):
    for block in blocks(page):
        for command in block.commands:
            check_options(command, f"{block}: {command}")


def check_options(command: str, where: str) -> None:
    words = shlex.split(command)
    if "…" in words or any(w.startswith("[") for w in words) or "secateur" not in words:
        if "secateur" not in words:
            assert reason(command, NOT_RUN), f"{where}: neither run nor in NOT_RUN"
        return
    name, *args = words[words.index("secateur") + 1 :]
    assert name in cli.commands, where
    own = cli.commands[name]
    try:
        with own.make_context(name, args, resilient_parsing=False):
            pass
    except click.ClickException as error:
        pytest.fail(f"{where}: {error.format_message()}")


def test_an_option_that_is_gone_is_found():
    check_options("secateur compress MODEL OUT --keep 0.8", "here")
    for wrong in ("compress MODEL OUT --kep 0.8", "compress MODEL", "plan M --steps"):
        with pytest.raises(pytest.fail.Exception, match="here"):
            check_options(f"secateur {wrong}", "here")
    with pytest.raises(AssertionError, match="here"):
        check_options("secateur shrink MODEL", "here")
    with pytest.raises(AssertionError, match="neither run nor"):
        check_options("curl example.com", "here")


PYTHON = [block for block in ALL if block.language == "python"]


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_code_compiles_and_what_it_imports_is_there(block):
    check_code(block.text)


def check_code(text: str) -> None:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")


def test_a_name_that_is_gone_is_found():
    check_code("from secateur import compress\nfrom secateur.methods import base")
    for wrong in ("from secateur import refine_all", "import secateur.crew", "a ="):
        with pytest.raises((ImportError, SyntaxError)):
            check_code(wrong)


DATA = [block for block in ALL if block.language in ("json", "yaml")]


@pytest.mark.parametrize("block", DATA, ids=str)
def test_data_is_read(block):
    """A part of a JSON object is one with braces around it; ``…`` stands for what is left out."""
    text = block.text.replace("…", "").replace("...", "")
    if block.language == "yaml":
        assert isinstance(yaml.safe_load(text), dict)
        return
    whole = text if text.lstrip().startswith("{") else "{" + text + "}"
    assert isinstance(json.loads(re.sub(r",(\s*[}\]])", r"\1", whole)), dict)


# Run


@pytest.fixture
def desk(room: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that pages speak of."""
    monkeypatch.chdir(room)
    for seed, name in enumerate(("corpus.txt", "other.txt", "TEXT.txt"), 1):
        (room / name).write_text(sentences(seed, 200))
    steps = "[{method: auto}, {method: svd-llm, keep: 0.5, options: {rank_step: 1}}]"
    (room / "recipe.yaml").write_text(f"steps: {steps}")
    return room


def follow(page: str, run, model: Path, finished: Path) -> Iterator[str]:
    """Run a page's blocks in their order; gives what it did not run."""
    names: dict[str, object] = {}
    for block in blocks(page):
        for command in block.commands:
            if reason(command, NOT_RUN):
                yield command
                continue
            args = given(shlex.split(command)[1:], model, page)
            if args[0] in ("eval", "export", "report", "compare"):
                for name in (arg for arg in args[1:] if re.fullmatch("[A-Z]+", arg)):
                    if not Path(name).exists():  # as in OUT and RUN: what the reader has made
                        shutil.copytree(finished, name)
            shown = run(*args)
            assert shown.code == 0, (str(block), command, shown.err)
        if block.language == "python":
            if reason(block.text, NOT_EXECUTED):
                yield block.text
                continue
            text = re.sub(r'"demo"', repr(str(model)), block.text)
            for opened in re.findall(r'from_pretrained\("([\w-]+)"', text):
                if not Path(opened).exists():  # of a command that `make` runs
                    shutil.copytree(finished, opened)
            with contextlib.redirect_stdout(None):
                exec(compile(text, str(block), "exec"), names)


@pytest.mark.parametrize(
    "page", [p if p in QUICK else pytest.param(p, marks=pytest.mark.slow) for p in PAGES]
)
def test_a_page_is_followed_from_the_top(desk, run, near, model, finished, page):
    left = set(follow(page, run, model, finished[0]))
    for text in left:
        assert reason(text, NOT_RUN) or reason(text, NOT_EXECUTED)


def test_every_reason_is_needed():
    """A reason whose command is gone goes too."""
    shown = [command for block in ALL for command in block.commands]
    shown += [block.text for block in PYTHON]
    assert [part for part in NOT_EXECUTED if not any(part in f"{text} " for text in shown)] == []
