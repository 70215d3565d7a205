"""Task files: items with a correct answer, one JSON object per line, scored as the harness does."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secateur.data.tokens import expanded
from secateur.evaluate.likelihood import Pair, encoded, likelihoods
from secateur.evaluate.significance import Answers, points
from secateur.io.safe_parse import HostileError, lines_of, opened_lines, parse_json
from secateur.models.model import Model
from secateur.utils.errors import InputError, shown

FORMS = (
    ("query", "choices", "gold"),
    ("context_options", "continuation", "gold"),
    ("context", "continuation"),
)
SEVERAL, MAYBE_EMPTY = {"choices", "context_options"}, {"query", "context"}
SUFFIXES = {".jsonl", ".json"}
DELIMITER = " "  # between a context and its continuation, as in the harness


@dataclass(frozen=True)
class Item:
    """One question: texts of which one should be the most probable.

    Attributes:
        pairs: context and continuation of each answer; a single one should be the greedy one.
        gold: number of the right answer.
        lengths: characters of each answer, by which ``acc_norm`` divides; of answers that differ in
            their contexts none.
    """

    pairs: tuple[tuple[str, str], ...]
    gold: int
    lengths: tuple[int, ...] = ()


@dataclass(frozen=True)
class TaskFile:
    """The items of a file under a name."""

    name: str
    items: tuple[Item, ...]

    @property
    def requests(self) -> int:
        """Number of log-probabilities to compute."""
        return sum(len(item.pairs) for item in self.items)

    @property
    def chance(self) -> float | None:
        """Mean accuracy of random answers; None if any text could be the answer."""
        if len(self.items[0].pairs) == 1:
            return None
        return sum(1 / len(item.pairs) for item in self.items) / len(self.items)


def is_file(task: str) -> bool:
    """Whether a task is the name of a file rather than of a harness task."""
    path = expanded(task)
    return path.suffix in SUFFIXES or task.startswith((".", "/", "~")) or path.is_file()


def read_task(source: str, limit: int | None = None) -> TaskFile:
    """The first items of a task file; all without a limit.

    Raises:
        InputError: the file is missing, unreadable or empty, or a line is no item.
    """
    path, items = expanded(source), []
    form: tuple[str, ...] = ()
    try:
        with opened_lines(path) as file:
            for number, line in lines_of(file):
                where = f"task file {source!r}, line {number}"
                row = _object(line, where)
                form = form or _form(row, where)
                items.append(_item(row, form, where))
    except UnicodeDecodeError as error:
        raise InputError(f"task file {source!r} is not UTF-8 ({error.reason}).") from error
    except OSError as error:
        raise InputError(f"task file {source!r}: {error.strerror}.") from error
    except HostileError as error:
        raise InputError(f"task file {source!r}: {error}.") from error
    if not items:
        raise InputError(f"task file {source!r} is empty. {_forms()}")
    return TaskFile(Path(source).stem, tuple(items[:limit]))


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = parse_json(line.encode())
    except HostileError as error:
        raise InputError(f"{where}: {error}.") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: no JSON object. {_forms()}")
    return row


def _form(row: dict[str, Any], where: str) -> tuple[str, ...]:
    """The form of a file's first item, or the closest one."""
    having = [form for form in FORMS if all(key in row for key in form)]
    if having:
        return having[0]
    nearest = max(FORMS, key=lambda form: sum(key in row for key in form) / len(form))
    raise InputError(f"{where}: {_lacks(row, nearest)} {_forms()}")


def _item(row: dict[str, Any], form: tuple[str, ...], where: str) -> Item:
    if any(key not in row for key in form):
        raise InputError(f"{where}: {_lacks(row, form)} The first item has {', '.join(form)}.")
    for key in form:
        value = row[key]
        if key in SEVERAL:
            if not isinstance(value, list) or len(value) < 2 or not all(map(_is_text, value)):
                raise InputError(f"{where}: {key!r} should be a list of two texts or more.")
        elif key != "gold" and not (_is_text(value) or (key in MAYBE_EMPTY and value == "")):
            raise InputError(f"{where}: {key!r} should be a text.")
    if form == FORMS[2]:
        return Item(((row["context"], DELIMITER + row["continuation"]),), 0)
    options, gold = row[next(key for key in form if key in SEVERAL)], row["gold"]
    if type(gold) is not int or not 0 <= gold < len(options):
        raise InputError(
            f"{where}: gold {shown(gold)} should be the number of the right answer, 0 to "
            f"{len(options) - 1}."
        )
    if form == FORMS[1]:
        behind = DELIMITER + row["continuation"]
        return Item(tuple((option, behind) for option in options), gold)
    pairs = tuple((row["query"], DELIMITER + choice) for choice in options)
    return Item(pairs, gold, tuple(map(len, options)))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _lacks(row: dict[str, Any], form: tuple[str, ...]) -> str:
    missing = [repr(key) for key in form if key not in row]
    there = ", ".join(map(shown, [*row][:12])) or "no key"
    return f"lacks {' and '.join(missing)}; it has {there}."


def _forms() -> str:
    return f"Each line is an object with {'; or '.join(', '.join(form) for form in FORMS)}."


def answered_file(
    model: Model, task: TaskFile, advance: Callable[[int], None] = lambda _: None
) -> Answers:
    """The model's answers to all items of a file.

    The answer is the choice with the highest log-probability; for ``acc_norm`` with the highest per
    character. A single continuation is correct if all its tokens are top-1 predictions. ``advance``
    gets the number of log-probabilities computed.

    Raises:
        InputError: an item does not fit the model.
    """
    pairs = [_encoded(model, task, i, *pair) for i, x in enumerate(task.items) for pair in x.pairs]
    found = iter(likelihoods(model, pairs, advance))
    chosen, best, normed = [], [], []
    for item in task.items:
        own = [next(found) for _ in item.pairs]
        totals = points([one.total for one in own])
        if len(own) == 1:
            chosen.append(int(own[0].greedy))
            best.append(float(own[0].greedy))
            continue
        chosen.append(int(totals.argmax()))
        best.append(float(chosen[-1] == item.gold))
        if item.lengths:
            relative = totals / points(list(map(float, item.lengths)))
            normed.append(float(int(relative.argmax()) == item.gold))
    right = {"acc": points(best)} | ({"acc_norm": points(normed)} if normed else {})
    return Answers(right, torch.tensor(chosen), task.chance)


def _encoded(model: Model, task: TaskFile, number: int, context: str, continuation: str) -> Pair:
    try:
        return encoded(model.tokenizer, context, continuation)
    except InputError as error:
        raise InputError(f"task {task.name}, item {number + 1}: {error}") from error
