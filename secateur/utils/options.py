"""Fields of a frozen dataclass that are also flags: bounds, help text and their check.

Pydantic checks the values. The dataclasses are those of the standard library all the same: those of
pydantic raise their own error from the constructor, and store 1 as 1.0, so that the options in a
plan, and the names of kept scores, would differ from what was asked for. Pydantic is imported when
the first value is checked, as ``secateur --help`` checks none and would take twice the time.
"""

from collections.abc import Collection, Mapping
from dataclasses import field, fields
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from secateur.utils.errors import InputError, nearest, shown

if TYPE_CHECKING:
    from pydantic import TypeAdapter

Built = TypeVar("Built")
#: what a value should be, by the name of pydantic's complaint; others are about the interval
WANTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "finite_number": "finite",
}


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

    Values stay as they are given: a whole number for a fraction is no fraction afterwards.

    Raises:
        InputError: a value is of another type, or outside its interval.
    """
    from pydantic import ValidationError

    for f in fields(thing):
        value, low, high = getattr(thing, f.name), f.metadata.get("low"), f.metadata.get("high")
        kind: type = type(f.default)
        try:
            _validator(kind, low, high).validate_python(value)
        except ValidationError as error:
            wanted = WANTED.get(error.errors(include_url=False)[0]["type"])
            if wanted is None:
                wanted = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
            raise InputError(
                f"{thing.name}: {f.name}={shown(value)} should be {wanted}."
            ) from error


@cache
def _validator(kind: type, low: float | None, high: float | None) -> "TypeAdapter[Any]":
    """Takes values of one type within an interval, and changes none into another type."""
    from pydantic import Field, TypeAdapter

    unbounded = False if kind is float else None  # infinity and NaN are questions to floats alone
    bounds = Field(strict=True, ge=low, le=high, allow_inf_nan=unbounded)
    return TypeAdapter(Annotated[kind, bounds])  # type: ignore[arg-type]


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
