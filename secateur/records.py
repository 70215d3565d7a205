"""Records on disk: plain data with a schema, read without trust."""

from pathlib import Path
from typing import Any, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict

from secateur.errors import InputError

R = TypeVar("R", bound="Record")


class Record(BaseModel):
    """Fields that can't be changed, and no others."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def read_record(kind: type[R], path: Path, what: str, most_bytes: int, advice: str = "") -> R:
    """Read a JSON file as a record; ``what`` names it in messages, ``advice`` ends them.

    Raises:
        InputError: the file is missing, too large, no JSON, or not of this kind and version.
    """
    try:
        if path.stat().st_size > most_bytes:
            raise InputError(f"{what} {str(path)!r}: larger than any {what}; is it the right file?")
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{what} {str(path)!r}: {error.strerror}.") from error
    except pydantic.ValidationError as error:
        raise InputError(f"{what} {str(path)!r}: {said(error)}.{advice}") from error


def said(error: pydantic.ValidationError) -> str:
    """Where a record is wrong first, and how."""
    first: Any = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "the file"
    return f"{where}: {first['msg']}"
