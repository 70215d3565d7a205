"""Which channels, heads and rotary pairs stay: indices by unit, kept in a file beside a plan."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.io.run_directory import whole
from secateur.io.safe_parse import HostileError
from secateur.io.safetensors_header import read_header
from secateur.io.schema import reading
from secateur.structure.units import Unit
from secateur.utils.errors import InputError, nearest, shown

MAX_BYTES = 2**30
MAX_UNITS = 2**16
DROP = "To let the method choose again, set `selection` to null in the plan."


@dataclass(frozen=True, eq=False)
class Selection:
    """Which coordinates of each unit stay, so that what was searched or learned is applied again.

    A unit that is not named keeps its size, or is left to the method. Two selections are equal if
    they have the same :attr:`digest`.

    Attributes:
        kept: unit name → indices of what stays, int64: (k) in ascending order for the channels of
            an MLP and for KV heads; (kv heads, k) for the width of queries and keys, the first
            halves of its rotary pairs before the second halves.
    """

    kept: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        own = {n: self.kept[n].detach().to("cpu", torch.int64, copy=True) for n in self.kept}
        object.__setattr__(self, "kept", {name: own[name].contiguous() for name in sorted(own)})

    @property
    def sizes(self) -> dict[str, int]:
        """Unit name → how much of it stays."""
        return {name: kept.shape[-1] for name, kept in self.kept.items()}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of names, shapes and indices, in hex; the same for every way to store them."""
        found = hashlib.sha256()
        for name, kept in self.kept.items():
            found.update(f"{name}\n{list(kept.shape)}\n".encode())
            found.update(kept.numpy().astype("<i8").tobytes())
        return found.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Selection) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def check(self, units: Mapping[str, Unit], sizes: Mapping[str, int]) -> None:
        """Hold the indices against the units that they are of, and the sizes of a plan.

        Raises:
            InputError: an unknown unit or one that has no indices; a wrong shape; an index out of
                range, twice or out of order; or another size than the plan's.
        """
        for name, kept in self.kept.items():
            if name not in units:
                raise InputError(
                    f"selection: there is no unit {shown(name)}. {nearest(name, units)}"
                )
            _check_unit(units[name], kept, sizes[name])

    def save(self, folder: Path) -> Path:
        """Write it to a folder under the name that its digest gives; give the file's path.

        Raises:
            OSError: it can't be written.
        """
        path = folder / file_name(self.digest)
        with whole(path) as partial:
            save_file(dict(self.kept), partial)
        return path

    @classmethod
    def load(cls, folder: Path, digest: str) -> "Selection":
        """Read the selection of a digest from a folder; nothing in the file is trusted.

        Raises:
            InputError: the file is missing, damaged or too large, holds anything but indices, or
                is not the one that was named.
        """
        path = folder / file_name(digest)
        named = f"selection file {str(path)!r}"
        if not path.exists():
            raise InputError(
                f"{named} is missing; the plan names it, and it belongs beside the plan. {DROP}"
            )
        with reading(path, "selection file", f" {DROP}"):
            if path.stat().st_size > MAX_BYTES:
                raise HostileError("larger than any selection; is it the right file?")
            entries = read_header(path)
            if len(entries) > MAX_UNITS:
                raise HostileError(f"more than {MAX_UNITS} units")
            for name, entry in entries.items():
                if entry.dtype != "I64" or len(entry.shape) not in (1, 2):
                    raise HostileError(
                        f"{shown(name)} should be a list of indices (I64), and is {entry.dtype} "
                        f"of shape {entry.shape}"
                    )
            try:
                found = cls(load_file(path))
            except SafetensorError as error:
                raise HostileError(str(error)) from error
        if found.digest != digest:
            raise InputError(
                f"{named} is not the one that the plan names: its digest is {found.digest[:16]}…; "
                f"it was changed, or renamed. Copy it again from beside the plan. {DROP}"
            )
        return found


def file_name(digest: str) -> str:
    """The name of the file of a selection."""
    return f"selection-{digest[:16]}.safetensors"


def _check_unit(unit: Unit, kept: Tensor, size: int) -> None:
    shape = unit.index_shape(kept.shape[-1])
    if shape is None:
        raise InputError(f"selection, {unit.name}: a unit of kind {unit.kind!r} has no indices.")
    if tuple(kept.shape) != shape:
        raise InputError(
            f"selection, {unit.name}: indices of shape {tuple(kept.shape)} don't fit the unit, "
            f"which has {shape}."
        )
    if kept.shape[-1] != size:
        raise InputError(
            f"plan, {unit.name}: the size is {size}, and the plan's selection keeps "
            f"{kept.shape[-1]}. Set the size back to {kept.shape[-1]}. {DROP}"
        )
    if size == unit.size:
        raise InputError(f"selection, {unit.name}: it keeps its size, and needs no indices.")
    if kept.numel() and (int(kept.min()) < 0 or int(kept.max()) >= unit.size):
        raise InputError(
            f"selection, {unit.name}: an index is out of range; it has 0 to {unit.size - 1}."
        )
    ordered = kept.sort(dim=-1).values
    if bool((ordered.diff(dim=-1) == 0).any()):
        raise InputError(f"selection, {unit.name}: an index is there twice.")
    if kept.dim() == 1 and not torch.equal(ordered, kept):
        raise InputError(f"selection, {unit.name}: indices should be in ascending order.")
