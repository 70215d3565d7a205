"""Numbers of every token, in memory or, where they are many, in a file without a name."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from secateur.utils.errors import HaltedError, RunError

MOST_BYTES = 2**27  # kept in memory where a folder is given


class Activations:
    """Windows × tokens × hidden numbers, read and written some windows at a time.

    Everything is in memory unless a ``folder`` is given and they take more than
    :data:`MOST_BYTES`. What is in a file is read and written, not mapped, so that it counts for no
    memory of this process; the file has no name and is gone with the process, however that ends.

    Raises:
        HaltedError: the folder has no space left.
    """

    def __init__(self, shape: torch.Size, dtype: torch.dtype, folder: Path | None) -> None:
        self.shape, self.dtype, self.folder = shape, dtype, folder
        self._row = shape[1:].numel() * dtype.itemsize
        self._memory: Tensor | None = None
        if folder is None or self._row * shape[0] <= MOST_BYTES:
            self._memory = torch.zeros(shape, dtype=dtype)
        else:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Tensor:
        """The numbers of some windows; changing what was read changes nothing here."""
        if self._memory is not None:
            return self._memory[rows].clone()
        first, last, _ = rows.indices(len(self))
        found = torch.empty((last - first, *self.shape[1:]), dtype=self.dtype)
        room, at = _bytes(found), 0
        self._file.seek(first * self._row)
        while at < len(room):
            count = self._file.readinto(room[at:])
            if not count:
                raise RunError("hidden states were read before they were written.")
            at += count
        return found

    def __setitem__(self, rows: slice, values: Tensor) -> None:
        """Put numbers for some windows, on whatever device they are."""
        if self._memory is not None:
            self._memory[rows] = values.to(self._memory)
            return
        first, _, _ = rows.indices(len(self))
        given = values.detach().to("cpu", self.dtype).contiguous()
        left = _bytes(given)
        self._file.seek(first * self._row)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise HaltedError(
                f"{str(self.folder)!r} has no room for the hidden states ({error.strerror}), "
                f"{self._row * len(self) / 2**30:.1f} GB; make some, and repeat the command."
            ) from error

    def put(self, rows: slice, part: slice, values: Tensor) -> None:
        """Put numbers for some tokens of some windows."""
        if values.shape[1] == self.shape[1]:
            self[rows] = values
            return
        whole = self[rows]
        whole[:, part] = values.to(whole)
        self[rows] = whole

    def copy(self, rows: int) -> "Activations":
        """The same numbers once more, copied so many windows at a time."""
        other = Activations(self.shape, self.dtype, self.folder)
        other.take(self, rows)
        return other

    def save(self, path: Path, first: int | None = None) -> None:
        """Write all numbers to a file; it is whole when this returns.

        With ``first``, they are the windows from there on of a file that others write to.

        Raises:
            HaltedError: there is no room for it.
        """
        try:
            if first is not None:
                path.touch()
            with path.open("wb" if first is None else "r+b", buffering=0) as file:
                file.seek((first or 0) * self._row)
                for start in range(0, len(self), self._some):
                    left = _bytes(self[start : start + self._some])
                    while left:
                        left = left[file.write(left) :]
        except OSError as error:
            raise HaltedError(
                f"{str(path.parent)!r} has no room for the hidden states ({error.strerror}); make "
                f"some, and repeat the command."
            ) from error

    def load(self, path: Path, first: int = 0) -> None:
        """Take the numbers that :meth:`save` wrote there, of the same shape."""
        with path.open("rb") as file:
            file.seek(first * self._row)
            for start in range(0, len(self), self._some):
                rows = min(self._some, len(self) - start)
                found = torch.empty((rows, *self.shape[1:]), dtype=self.dtype)
                if file.readinto(_bytes(found)) != rows * self._row:
                    raise RunError(f"{str(path)!r} is cut short; add --overwrite to start afresh.")
                self[start : start + rows] = found

    @property
    def _some(self) -> int:
        """Windows that are moved at once."""
        return max(1, MOST_BYTES // 8 // max(1, self._row))

    def take(self, other: "Activations", rows: int) -> None:
        """Become like another of the same shape."""
        for start in range(0, len(self), rows):
            self[start : start + rows] = other[start : start + rows]


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.flatten().view(torch.uint8).numpy().data
