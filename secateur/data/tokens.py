"""Windows of tokens from a file, a folder, JSONL, a Hugging Face dataset or the bundled text."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from secateur.data import bundled
from secateur.io.safe_parse import HostileError, lines_of, opened_lines, parse_json
from secateur.utils.errors import InputError, nearest, shown

BUNDLED = "bundled"
SUFFIXES = {".txt", ".md", ".rst", ".text", ".raw", ".py"}
SET_ASIDE = 0.8  # calibration never sees what lies behind this share of its text
MAX_CHARACTERS = 16_000_000  # of a source, from its start: some four million tokens
PIECE = 100_000  # characters tokenised at a time
UNLABELLED = -100  # the label that transformers' losses leave out, too
#: how windows may be chosen; see select.py
SELECTIONS = ("none", "kl", "leverage", "dpp")


@dataclass(frozen=True)
class Tokens:
    """What a model reads, row by row: windows of token ids, or images.

    Attributes:
        ids: int64 (windows, length); of images float (images, channels, height, width).
        mask: bool, false where a row is padded: the positions that the blocks see, as (rows,
            length). Padding stands at the end, so that a causal model's real tokens never see it.
        labels: what the output should be, int64 with :data:`UNLABELLED` where nothing says; None
            where every token is what the one before it should give.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice | Sequence[int]) -> Self:
        """The tokens of some rows."""
        return self._each(lambda tensor: tensor[rows if isinstance(rows, slice) else list(rows)])

    def to(self, device: torch.device) -> Self:
        """The tokens on another device."""
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, of: Callable[[Tensor], Tensor]) -> Self:
        labels = None if self.labels is None else of(self.labels)
        return type(self)(of(self.ids), of(self.mask), labels)

    @property
    def whole(self) -> Self:
        """The rows without padding."""
        return self[self.mask.all(1).nonzero().flatten().tolist()]

    @property
    def length(self) -> int:
        """Number of positions per row."""
        return self.mask.shape[1]

    @property
    def count(self) -> int:
        """Number of tokens without padding."""
        return int(self.mask.sum())

    @property
    def fingerprint(self) -> str:
        """Hash of the ids, the mask and the labels, if any."""
        parts = [part for part in (self.ids, self.mask, self.labels) if part is not None]
        data = b"".join(part.numpy().tobytes() for part in parts)
        return hashlib.sha256(data).hexdigest()[:16]


@dataclass(frozen=True)
class Text:
    """An evaluation text: the part of a source from the share ``start`` on, with a name."""

    name: str
    source: str
    start: float = 0.0


@dataclass(frozen=True)
class Calibration:
    """The calibration data of a run: source, amount and choice of windows.

    Attributes:
        source: a text file, a folder of them, a .jsonl file (field "text"), "bundled", or a
            ``datasets`` name as NAME[:CONFIG[:SPLIT]].
        samples: number of windows.
        length: tokens in a window.
        seed: of the choice of windows.
        select: "none" draws windows at random; "kl", "leverage" and "dpp" choose among more, see
            :func:`~secateur.scoring.calibration_selection.select_calibration`.
        windows: what was chosen, as places among the consecutive windows of the text; empty until
            then, and where windows are drawn at random.
    """

    source: str = BUNDLED
    samples: int = 128
    length: int = 256
    seed: int = 0
    select: str = "none"
    windows: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.select not in SELECTIONS:
            known = nearest(self.select, SELECTIONS)
            raise InputError(f"unknown --select-calibration {shown(self.select)}. {known}")

    def as_dict(self) -> dict[str, Any]:
        """Plain data for plans and reports."""
        return asdict(self)


def expanded(path: str | Path) -> Path:
    """Expand ~ in a path to the home folder; unchanged if there is no such user.

    Raises:
        InputError: it can't be one.
    """
    if "\0" in str(path):
        raise InputError(f"{shown(str(path))} is no path: it has a NUL in it.")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def read_documents(source: str, split: str = "calibration") -> list[str]:
    """All nonempty documents of a source; ``split`` selects a part of the bundled text.

    Raises:
        InputError: there is no such source, it cannot be read as text, or it is empty.
    """
    path = expanded(source)
    if source == BUNDLED:
        documents = [bundled.text("held" if split == "held" else "calibration")]
    elif path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES | {".jsonl"})
        if not files:
            raise InputError(f"text folder {source!r} holds no .txt, .md, .rst or .jsonl file.")
        documents, room = [], MAX_CHARACTERS
        for file in files:
            documents += _read_file(file, room)
            room = MAX_CHARACTERS - sum(map(len, documents))
    elif path.is_file():
        documents = _read_file(path, MAX_CHARACTERS)
    elif path.suffix in SUFFIXES | {".jsonl", ".json"} or source.startswith((".", "/", "~")):
        raise InputError(f"text {source!r}: no such file or folder.")
    else:
        documents = _read_dataset(source)
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise InputError(f"text {source!r} is empty.")
    return documents


def _read_file(path: Path, room: int) -> list[str]:
    """Documents of a file, up to about ``room`` characters."""
    documents: list[str] = []
    try:
        with opened_lines(path) as file:
            if path.suffix != ".jsonl":
                return [file.read(max(0, room)).replace("\r\n", "\n")]
            for number, line in lines_of(file):
                if room <= 0:
                    break
                documents.append(_field(line, path, number))
                room -= len(documents[-1])
    except UnicodeDecodeError as error:
        raise InputError(f"text {str(path)!r} is not UTF-8 ({error.reason}).") from error
    except OSError as error:
        raise InputError(f"text {str(path)!r}: {error.strerror}.") from error
    except HostileError as error:
        raise InputError(f"text {str(path)!r}: {error}.") from error
    return documents


def _field(line: str, path: Path, number: int) -> str:
    try:
        row = parse_json(line.encode())
    except HostileError as error:
        raise InputError(f"text {str(path)!r}, line {number}: {error}.") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise InputError(
            f'text {str(path)!r}, line {number}: needs an object with a "text" string.'
        )
    return str(row["text"])


def _read_dataset(source: str) -> list[str]:
    name, config, split = (*source.split(":"), "", "")[:3]
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"text {source!r} is no file here; to read it as a datasets name, "
            f'pip install "secateur[datasets]".'
        ) from error
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        documents, characters = [], 0
        for row in rows:
            if not isinstance(row.get("text"), str):
                raise InputError(f'dataset {source!r}: its rows have no "text" column.')
            documents.append(row["text"])
            characters += len(row["text"])
            if characters > MAX_CHARACTERS:
                break
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"text {source!r}: no such file, and datasets cannot load it ({reason})."
        ) from error
    return documents


def token_stream(documents: list[str], tokenizer: Any) -> Tensor:
    """Token ids of all documents as one row, separated by the end-of-text token if there is one."""
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    parts: list[Tensor] = []
    for document in documents:
        if parts and separator:
            parts.append(torch.tensor(separator))
        for start in range(0, len(document), PIECE):  # one list of all ids would take gigabytes
            piece = document[start : start + PIECE]
            ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
            parts.append(torch.tensor(ids, dtype=torch.int64))
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def sample(
    stream: Tensor, samples: int, length: int, seed: int, name: str = "calibration text"
) -> Tokens:
    """Draw windows of ``length`` tokens at random from the stream, without overlap.

    The stream is divided into consecutive windows, and ``samples`` of them are drawn in random
    order, so that the first few are also a sample. If there are fewer, all are taken, and the last,
    shorter one is padded.

    Raises:
        InputError: the stream is shorter than one window.
    """
    if len(stream) < length:
        raise InputError(
            f"{name} is too short: {len(stream)} tokens to draw from, and one window takes "
            f"{length}. Give more text, or --length {max(2, len(stream) // 2)}."
        )
    whole, rest = divmod(len(stream), length)
    if whole >= samples:
        return windows_at(stream, drawn(whole, seed)[:samples], length, name)
    rows = whole + (rest > 1)
    ids = torch.zeros(rows * length, dtype=torch.int64)
    used = min(len(stream), rows * length)
    ids[:used] = stream[:used]
    mask = torch.arange(rows * length) < used
    return Tokens(ids.view(rows, length), mask.view(rows, length))


def drawn(whole: int, seed: int) -> list[int]:
    """Positions of all whole windows in random order."""
    order = torch.randperm(whole, generator=torch.Generator().manual_seed(seed))
    return [int(place) for place in order]


def windows_at(
    stream: Tensor, places: Sequence[int], length: int, name: str = "calibration text"
) -> Tokens:
    """The consecutive windows of the stream at the given positions, in that order.

    Raises:
        InputError: the stream is too short to have one of them.
    """
    whole = len(stream) // length
    if missing := [place for place in places if not 0 <= place < whole]:
        raise InputError(
            f"{name} has {whole} windows of {length} tokens, and window {missing[0]} was chosen: "
            f"it is another text. Choose again, with `secateur plan`."
        )
    ids = stream[: whole * length].view(whole, length)[list(places)]
    return Tokens(ids, torch.ones_like(ids, dtype=torch.bool))


def contiguous(
    stream: Tensor, length: int, limit: int | None = None, name: str = "text to judge on"
) -> Tokens:
    """Consecutive windows from the start of the stream, as used for perplexity.

    Raises:
        InputError: the stream is shorter than one window.
    """
    whole = len(stream) // length
    if whole == 0:
        raise InputError(
            f"{name} is too short: {len(stream)} tokens, and one window takes {length}. Give more "
            f"text, or --eval-length {max(2, len(stream) // 2)}."
        )
    whole = whole if limit is None else min(whole, limit)
    ids = stream[: whole * length].view(whole, length)
    return Tokens(ids, torch.ones_like(ids, dtype=torch.bool))


def calibration_stream(calibration: Calibration, tokenizer: Any) -> Tensor:
    """Token ids of the part of the text that is not held out, as one row.

    Raises:
        InputError: the text is missing, unreadable or empty.
    """
    stream = token_stream(read_documents(calibration.source), tokenizer)
    if calibration.source != BUNDLED:  # whose judging split is another text
        stream = stream[: int(SET_ASIDE * len(stream))]
    return stream


def calibration_tokens(calibration: Calibration, tokenizer: Any) -> Tokens:
    """The windows of a :class:`Calibration`, from the part of the text that is not held out.

    These are the chosen windows or, if none were chosen, random ones.

    Raises:
        InputError: the text is missing, unreadable, empty or too short.
    """
    stream, length = calibration_stream(calibration, tokenizer), calibration.length
    name = f"calibration text {calibration.source!r}"
    if calibration.windows:
        return windows_at(stream, calibration.windows, length, name)
    return sample(stream, calibration.samples, length, calibration.seed, name)


def held_windows(text: Text, tokenizer: Any, length: int, limit: int) -> Tokens:
    """The first windows of an evaluation text.

    Raises:
        InputError: the text is missing, unreadable, empty or too short.
    """
    stream = token_stream(read_documents(text.source, "held"), tokenizer)
    stream = stream[int(text.start * len(stream)) :]
    return contiguous(stream, length, limit, f"text {text.name!r}")
