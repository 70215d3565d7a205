"""The text and the small trained model that need no download.

Every CPython installation carries megabytes of English technical prose: the language reference that
``help()`` shows (``pydoc_data.topics``) and the docstrings and comments of the standard library.
This module reads that text from the running interpreter's own installation, cuts it into three
splits that share no document, and says where the package keeps the model trained on the first one.

Nothing is imported to get at the text: sources are read as text, never run. The text is that of
the running Python, so its size, and any perplexity measured on it, differ between versions.
"""

import ast
import hashlib
import inspect
import os
import re
import sysconfig
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Literal

Split = Literal["train", "calibration", "held"]

#: Folders with no documentation of their own, or with the same text many times over.
_SKIPPED = {
    *("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"),
    *("encodings", "ensurepip", "lib-dynload", "pydoc_data", "__phello__"),
}
#: Out of 100 by hash: below the first is training text, below the second is calibration text.
_TRAIN_BELOW, _CALIBRATION_BELOW = 82, 91
#: Chosen so that neither small split is tiny and no one document fills it.
_SALT = "110:"
#: A paragraph at least this long is kept only in the first document that has it.
_DUPLICATE_LENGTH = 80

# Every comment and string; a string hides any '#' inside it. Possessive: it cannot backtrack.
_COMMENT_OR_STRING = re.compile(
    r'#[^\n]*+|"""(?:[^"\\]++|\\.|"(?!""))*+"""|"(?:[^"\\\n]++|\\.)*+"'
    r"|'''(?:[^'\\]++|\\.|'(?!''))*+'''|'(?:[^'\\\n]++|\\.)*+'",
    re.DOTALL,
)
_SEPARATOR = re.compile(r"[-=*#~_+.^|/\s]{4,}")
_NOT_PROSE = re.compile(r"#!|#.*-\*-|#\s*(?:vim?|type|pragma|fmt|noqa)\s*:", re.IGNORECASE)
_TO_ASCII = str.maketrans(
    {"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "--", "…": "...", "•": "*", "→": "->"}
)


def _clean(text: str) -> str:
    """Plain ASCII text with its line breaks, without separator lines or repeated blank lines."""
    if not text.isascii():
        text = unicodedata.normalize("NFKD", text.translate(_TO_ASCII))
        text = text.encode("ascii", "ignore").decode("ascii")
    lines: list[str] = []
    for line in text.expandtabs().splitlines():
        line = line.rstrip()
        if _SEPARATOR.fullmatch(line) or (not line and (not lines or not lines[-1])):
            continue
        lines.append(line)
    return "\n".join(lines).rstrip()


def _pieces(source: str) -> Iterator[str]:
    """Docstrings and whole-line comment blocks of a module, in source order."""
    block: list[str] = []
    code_before = False
    block_end = block_column = -1
    for match in _COMMENT_OR_STRING.finditer(source):
        position, found = match.start(), match[0]
        line_start = source.rfind("\n", 0, position) + 1
        before = source[line_start:position]
        if found[0] == "#":
            if before.strip() or _NOT_PROSE.match(found):
                continue
            if block and (block_end != line_start or block_column != position):
                yield "\n".join(block)
                block = []
            block.append(found.lstrip("#").removeprefix(" "))
            block_end = match.end() + 1
            block_column = block_end + len(before)
            continue
        if found.startswith(('"""', "'''")) and before.strip().lower() in ("", "r", "u"):
            # a docstring opens the file or follows the colon that opens a block
            opener = line_start - 1
            while opener >= 0 and source[opener].isspace():
                opener -= 1
            if not code_before or source[opener] == ":":
                if block:
                    yield "\n".join(block)
                    block = []
                body = found[3:-3]
                if "\\" in body and not before.strip():
                    body = body.replace("\\\n", "").replace("\\\\", "\\")
                yield inspect.cleandoc(body)
        code_before = True
    if block:
        yield "\n".join(block)


def _module_text(source: str) -> str:
    """The cleaned prose of a module."""
    cleaned = (_clean(piece) for piece in _pieces(source))
    return "\n\n".join(piece for piece in cleaned if len(piece) >= 20 and " " in piece)


def _topics(path: Path) -> dict[str, str]:
    """The reference topics of ``help()``, read from the literal in their source file."""
    if not path.is_file():
        return {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(node.value)
            return {f"topic {name}": _clean(text) for name, text in topics.items()}
    return {}


def _sources(root: Path) -> Iterator[tuple[str, Path]]:
    """Dotted names and paths of all modules in the standard library's folder."""
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if name.isidentifier() and name not in _SKIPPED]
        for file in files:
            path = Path(folder, file)
            if path.suffix == ".py" and not file.startswith("_sysconfigdata"):
                parts = path.relative_to(root).with_suffix("").parts
                yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


@lru_cache(maxsize=1)
def _documents() -> dict[str, str]:
    root = Path(sysconfig.get_path("stdlib"))
    found = _topics(root / "pydoc_data" / "topics.py")
    for name, path in _sources(root):
        try:
            found[name] = _module_text(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):
            continue
    seen: set[str] = set()
    documents: dict[str, str] = {}
    for name in sorted(found):
        kept: list[str] = []
        for paragraph in found[name].split("\n\n"):
            if len(paragraph) >= _DUPLICATE_LENGTH:
                key = " ".join(paragraph.split())
                if key in seen:
                    continue
                seen.add(key)
            kept.append(paragraph)
        text = "\n\n".join(kept).strip("\n")
        if len(text) >= _DUPLICATE_LENGTH:
            documents[name] = text
    if not documents:
        raise ValueError(
            f"no Python sources below {str(root)!r}: this interpreter carries no standard library "
            "text (a frozen build?), so pass a text file of your own instead"
        )
    return documents


def documents() -> dict[str, str]:
    """Every document by name: a module's dotted name, or ``topic NAME`` for a reference topic.

    The order is that of the names. Text is plain ASCII with its line breaks kept; a paragraph of
    80 characters or more that several documents share stands only in the first of them.

    Raises:
        ValueError: if this Python installation has no standard library sources.
    """
    return dict(_documents())


def split_of(name: str) -> Split:
    """The split of a document, which depends on its name only."""
    share = int.from_bytes(hashlib.sha256((_SALT + name).encode()).digest()[:8], "big") % 100
    if share < _TRAIN_BELOW:
        return "train"
    return "calibration" if share < _CALIBRATION_BELOW else "held"


def text(split: Split) -> str:
    """The documents of one split, joined by blank lines.

    The bundled model was trained on ``train`` only; ``calibration`` and ``held`` share no document
    with it or with each other.

    Raises:
        ValueError: if there is no such split, or no standard library sources.
    """
    if split not in ("train", "calibration", "held"):
        raise ValueError(f"split must be 'train', 'calibration' or 'held', not {split!r}")
    return "\n\n".join(body for name, body in _documents().items() if split_of(name) == split)


def model_path() -> Path:
    """The folder of the bundled demo model, in the layout ``from_pretrained`` reads."""
    return Path(__file__).resolve().parent / "demo-model"
