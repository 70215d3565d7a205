"""Tensors that stay in their weight files and are read one at a time."""

import io
import math
import os
from pathlib import Path

import torch
from torch import Tensor

from secateur.io.safetensors_header import NAMES, Entry, places
from secateur.utils.errors import HaltedError, InputError

DTYPES = {name: dtype for dtype, name in NAMES.items()}
PIECE = 2**24  # bytes that are read at once where numbers get another format


class TensorReader:
    """Reads single tensors, by name, from the safetensors files of a folder.

    Files are read and not mapped, so that limits on memory apply. Don't use it to load all tensors.

    Raises:
        InputError: a file is damaged, or a tensor is in two of them.
    """

    def __init__(self, source: str, folder: Path) -> None:
        self.source = source
        self._places = places(folder)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def names(self) -> set[str]:
        """Names of all tensors."""
        return {*self._places}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._places[name][1].shape

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Read one tensor as it is stored, or floating-point tensors in ``dtype``, if given.

        Raises:
            HaltedError: its file has gone, has changed or cannot be read.
        """
        path, entry = self._places[name]
        if entry.dtype not in DTYPES:
            raise InputError(
                f"model {self.source!r}: {name} has number format {entry.dtype}, which is not read "
                f"tensor by tensor; add --stream off."
            )
        try:
            return read_tensor(
                path, entry, dtype if DTYPES[entry.dtype].is_floating_point else None
            )
        except OSError as error:
            raise HaltedError(
                f"model {self.source!r}: {path.name} cannot be read any more "
                f"({error.strerror or error}). See that the file is back as it was, and repeat the "
                f"command, which then goes on."
            ) from error

    def expect(self, names: list[str]) -> None:
        """Tell the operating system which tensors are needed next, so that it reads ahead."""
        if not hasattr(os, "posix_fadvise"):
            return
        for name in names:
            path, entry = self._places[name]
            try:
                with path.open("rb", buffering=0) as file:
                    length = entry.end - entry.start
                    os.posix_fadvise(file.fileno(), entry.start, length, os.POSIX_FADV_WILLNEED)
            except OSError:  # said when it is read
                return


def read_tensor(path: Path, entry: Entry, dtype: torch.dtype | None = None) -> Tensor:
    """Read a tensor of a file into memory; in ``dtype``, if given.

    Raises:
        OSError: it can't be read, or the file ends before it.
    """
    stored = DTYPES[entry.dtype]
    found = torch.empty(math.prod(entry.shape), dtype=dtype or stored)
    with path.open("rb", buffering=0) as file:
        file.seek(entry.start)
        if found.dtype == stored:
            _fill(file, found)
        else:
            for piece in found.split(PIECE // stored.itemsize):
                read = torch.empty(len(piece), dtype=stored)
                _fill(file, read)
                piece.copy_(read)
    return found.view(entry.shape)


def _fill(file: io.FileIO, tensor: Tensor) -> None:
    room, at = tensor.view(torch.uint8).numpy().data, 0
    while at < len(room):
        count = file.readinto(room[at:])
        if not count:
            raise OSError("it has become shorter")
        at += count
