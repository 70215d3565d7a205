"""What a unit costs, and what a matrix may be stored as."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cost:
    """Exact price of a unit at one size: stored, computed and cached."""

    parameters: int
    bytes: int
    flops_per_token: int
    cache_bytes_per_token: int


@dataclass(frozen=True)
class Form:
    """What a matrix may become: what stands in a checkpoint for it, and what that costs.

    Attributes:
        spec: plain JSON that says which tensors there are; for a run-time layer its whole spec.
        label: in a few characters, for tables.
        numbers: stored numbers of the model's own format.
        packed: bytes of everything else: codes, scales, indices, masks.
        multiplications: for one token, as the layer computes.
        parameters: numbers that say what the matrix is, however they are stored.
        stock: whether other libraries load it, as with integers in a common format.
        by: the method that makes it, where several offer theirs.
    """

    spec: Mapping[str, Any]
    label: str
    numbers: int
    packed: int
    multiplications: int
    parameters: int
    stock: bool = False
    by: str = ""

    def bytes(self, itemsize: int) -> int:
        """Bytes on disk, when a number of the model takes ``itemsize``."""
        return self.numbers * itemsize + self.packed
