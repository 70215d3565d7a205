"""Fields of a frozen dataclass that are also flags: bounds, help text and their check."""

import math
from collections.abc import Collection, Mapping
from dataclasses import field, fields
from typing import Any, TypeVar

from secateur.utils.errors import InputError, nearest, shown

Built = TypeVar("Built")


def option(default: Any, help: str, low: float | None = None, high: float | None = None) -> Any:
    """A field with its help text and the interval of its values, ends included."""
    return field(default=default, metadata={"help": help, "low": low, "high": high})


def undeclared(kind: type) -> str | None:
    """Why the fields of a class can't be flags, or None."""
    parameters = vars(kind).get("__dataclass_params__")
    if parameters is None or not parameters.frozen:
        return f"{kind.__name__} is no frozen dataclass"
    for f in fields(kind):
        if "help" not in f.metadata or type(f.default) not in (int, float, str):
            return f"its field {f.name} is not declared as `{f.name}: int = option(default, help)`"
    return None


def built(
    kind: type[Built], options: Mapping[str, Any], what: str, beside: Collection[str] = ()
) -> Built:
    """An object of a dataclass with the options that a file gives; ``what`` names it in messages.

    Raises:
        InputError: it has no such option, or one that is said ``beside`` them, or a value is wrong.
    """
    known = [f.name for f in fields(kind) if f.name not in beside]  # type: ignore[arg-type]
    for name in options:
        if name not in known:
            hint = f" {nearest(name, known)}" if known else ""
            raise InputError(f"{what} has no option {shown(name)}.{hint}")
    return kind(**options)


def flags_of(thing: Any) -> list[str]:
    """The fields of a dataclass as flags, with their values."""
    values = {f.name: getattr(thing, f.name) for f in fields(thing)}
    return [f"--{name.replace('_', '-')} {value}" for name, value in values.items()]


def checked(thing: Any) -> None:
    """Hold the fields of a dataclass with a ``name`` against their defaults' types and intervals.

    Raises:
        InputError: a value is of another type, or outside its interval.
    """
    for f in fields(thing):
        value, low, high = getattr(thing, f.name), f.metadata.get("low"), f.metadata.get("high")
        expected = type(f.default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            if isinstance(value, expected):
                continue
            wanted = {int: "a whole number", float: "a number"}.get(expected, "text")
            raise InputError(f"{thing.name}: {f.name}={shown(value)} should be {wanted}.")
        if expected is str:
            raise InputError(f"{thing.name}: {f.name}={value!r} should be text.")
        if expected is int and not isinstance(value, int):
            raise InputError(f"{thing.name}: {f.name}={value!r} should be a whole number.")
        if not math.isfinite(value):
            raise InputError(f"{thing.name}: {f.name}={value!r} should be finite.")
        if not (low is None or value >= low) or not (high is None or value <= high):
            bounds = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
            raise InputError(f"{thing.name}: {f.name}={value!r} should be {bounds}.")


def whole_numbers(thing: Any, name: str, low: int, high: int) -> tuple[int, ...]:
    """A text field of a dataclass with a ``name`` as whole numbers, ascending, each once.

    Raises:
        InputError: it is anything but whole numbers from ``low`` to ``high`` between commas.
    """
    text: str = getattr(thing, name)
    parts = [part.strip() for part in text.split(",")]
    digits = [part for part in parts if part.isascii() and part.isdigit() and len(part) < 10]
    nearby = sorted({min(max(int(part), low), high) for part in digits}) or [low]
    if digits != parts or [int(part) for part in digits if not low <= int(part) <= high]:
        raise InputError(
            f"{thing.name}: {name}={shown(text)} should be whole numbers between {low} and {high}, "
            f"with commas between several; try {','.join(map(str, nearby))}."
        )
    return tuple(nearby)
