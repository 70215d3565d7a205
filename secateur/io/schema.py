"""Records on disk: plain data with a schema, read as untrusted input."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeAlias, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, FailFast

from secateur.io.safe_parse import HostileError, parse_json, read_bytes
from secateur.utils.errors import InputError, shown, words

R = TypeVar("R", bound="Record")
MAX_VALUES = 2**20
T = TypeVar("T")
#: a list that is refused at its first wrong part: a fault of each part would take gigabytes
Parts: TypeAlias = Annotated[tuple[T, ...], FailFast()]


class Record(BaseModel):
    """A frozen model without additional fields.

    ``most_values`` limits the number of values in a file, at all levels.
    """

    most_values: ClassVar[int] = MAX_VALUES
    model_config = ConfigDict(extra="forbid", frozen=True)


def read_record(kind: type[R], path: Path, what: str, most_bytes: int, advice: str = "") -> R:
    """Read a JSON file as a record; ``what`` names it in messages, ``advice`` ends them.

    Raises:
        InputError: the file is missing, too large, no JSON, or not of this kind and version.
    """
    with reading(path, what, advice):
        raw = read_bytes(path, most_bytes, what)
        return kind.model_validate(parse_json(raw, kind.most_values))


def read_object(path: Path, what: str, most_bytes: int, advice: str = "") -> dict[str, Any]:
    """Read a JSON object that this package has written, including NaN and Infinity.

    Raises:
        InputError: the file is missing, too large, or no such object.
    """
    with reading(path, what, advice):
        found = parse_json(read_bytes(path, most_bytes, what), MAX_VALUES, finite=False)
        if not isinstance(found, dict):
            raise HostileError("it is no JSON object")
    return found


@contextmanager
def reading(path: Path, what: str, advice: str = "") -> Iterator[None]:
    """Add the name of the file to errors raised in this context.

    Raises:
        InputError: in place of what was raised inside.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"{what} {str(path)!r}: {error.strerror}.{advice}") from error
    except HostileError as error:
        raise InputError(f"{what} {str(path)!r}: {error}.{advice}") from error
    except pydantic.ValidationError as error:
        raise InputError(f"{what} {str(path)!r}: {said(error)}.{advice}") from error


def said(error: pydantic.ValidationError) -> str:
    """Describe the first error in a record and where it is."""
    first: Any = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(_named(part) for part in first["loc"]) or "the file"
    return f"{where}: {words(first['msg'])}"


def _named(part: Any) -> str:
    """A name in a file or a position in a list, quoted if it is not a plain name."""
    text = str(part)
    return text if len(text) < 100 and text.isprintable() else shown(part)
