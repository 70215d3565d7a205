"""Writing safetensors files while their tensors are computed."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from secateur.io.safetensors_header import BYTES, INDEX, NAMES, SINGLE, Entry, read_header
from secateur.io.safetensors_reader import read_tensor
from secateur.io.schema import Record

SHARD_BYTES = 4 * 2**30
COPIED = 2**24  # bytes at a time
ALIGNED = 8


class PendingTensor(NamedTuple):
    """A tensor in a shard that is not finished."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    length: int
    itemsize: int


class WriterState(Record):
    """What a writer has written so far; ``size`` and ``written`` are bytes."""

    pending: dict[str, PendingTensor]
    size: int = Field(ge=0)
    shards: list[list[str]]
    written: int = Field(ge=0)

    @field_validator("pending")
    @classmethod
    def _are_whole(cls, pending: dict[str, PendingTensor]) -> dict[str, PendingTensor]:
        for name, place in pending.items():
            itemsize = BYTES.get(place.dtype, 0)
            length = math.prod(place.shape) * itemsize
            if min(place.shape, default=0) < 0 or place.start < 0:
                raise ValueError(f"{name!r} can't be there")
            if (length, itemsize) != (place.length, place.itemsize) or not itemsize:
                raise ValueError(f"{name!r} has another size")
        return pending

    @model_validator(mode="after")
    def _are_written(self) -> "WriterState":
        ends = [place.start + place.length for place in self.pending.values()]
        if max(ends, default=0) != self.size:
            raise ValueError("size is not where the last tensor ends")
        return self


class Writer:
    """Appends tensors to a file immediately, and finishes a shard whenever it is full.

    No tensor stays in memory after it was added. Shards contain their tensors in the order of the
    safetensors library: wide number formats first, for alignment, then by name.

    Raises:
        OSError: the folder has no space left.
    """

    def __init__(
        self,
        folder: Path,
        shard_bytes: int = SHARD_BYTES,
        rename: Callable[[str, Tensor], str] = lambda name, _: name,
    ) -> None:
        self.folder = folder
        self.rename = rename
        self.shard_bytes = shard_bytes
        self._pending: dict[str, PendingTensor] = {}
        self._size = 0  # of what is pending
        self._shards: list[list[str]] = []
        self._written = 0
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def _data(self) -> Path:
        return self._shard(len(self._shards), "data")

    def _shard(self, number: int, ending: str = "safetensors") -> Path:
        return self.folder / f"shard-{number}.{ending}"

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor."""
        given = tensor.detach().cpu().contiguous()
        size = given.numel() * given.itemsize
        if self._pending and self._size + size > self.shard_bytes:
            self._flush()
        with self._data.open("r+b" if self._pending else "wb") as file:
            file.seek(self._size)
            file.truncate()
            if size:
                file.write(given.flatten().view(torch.uint8).numpy().data)
        place = PendingTensor(
            NAMES[given.dtype], tuple(given.shape), self._size, size, given.itemsize
        )
        self._pending[self.rename(name, tensor)] = place
        self._size += size
        self._written += size

    def state(self) -> WriterState:
        """The data that :meth:`go_on` needs to continue from here."""
        return WriterState(
            pending=dict(self._pending),
            size=self._size,
            shards=[[*names] for names in self._shards],
            written=self._written,
        )

    def settle(self) -> None:
        """Remove what is only needed to continue writing."""
        for number in range(len(self._shards)):
            self._shard(number, "data").unlink(missing_ok=True)

    def go_on(self, state: WriterState) -> bool:
        """Continue from the state of another writer to this folder, if all its data still exist.

        What it wrote after that state is discarded.
        """
        count = len(state.shards)
        for number in range(count):
            names = (f"model-{number + 1:05d}-of-*.safetensors", SINGLE if count == 1 else "")
            named = [path for name in names if name for path in self.folder.glob(name)]
            if not self._shard(number).exists() and len(named) == 1:
                named[0].rename(self._shard(number))
            if not self._shard(number).exists():
                return False
        data = self._shard(count, "data")
        if state.pending and (not data.exists() or data.stat().st_size < state.size):
            return False
        for path in self.folder.iterdir():
            kept = {data, *(self._shard(number) for number in range(count))}
            if path not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._pending, self._size = dict(state.pending), state.size
        self._shards, self._written = [[*names] for names in state.shards], state.written
        return True

    def read(self, name: str, like: Tensor) -> Tensor:
        """A tensor that was added; ``like`` has its shape."""
        published = self.rename(name, like)
        if (place := self._pending.get(published)) is not None:
            entry = Entry(place.dtype, place.shape, place.start, place.start + place.length)
            return read_tensor(self._data, entry)
        number = next(i for i, names in enumerate(self._shards) if published in names)
        return read_tensor(self._shard(number), read_header(self._shard(number))[published])

    def _flush(self) -> None:
        order = sorted(self._pending.items(), key=lambda item: (-item[1].itemsize, item[0]))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, place in order:
            offsets = [at, at + place.length]
            header[name] = {"dtype": place.dtype, "shape": place.shape, "data_offsets": offsets}
            at += place.length
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNED)
        path = self._shard(len(self._shards))
        with self._data.open("rb") as data, path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            for _, place in order:
                data.seek(place.start)
                _copy(data, file, place.length)
        self._shards.append([name for name, _ in order])
        self._pending.clear()
        self._size = 0

    def finish(self) -> None:
        """Write pending data, then give the shards the names that transformers expects.

        :meth:`settle` then removes what a state of before would need.
        """
        if self._pending:
            self._flush()
        count = len(self._shards)
        if count == 1:
            self._shard(0).rename(self.folder / SINGLE)
            return
        index: dict[str, str] = {}
        for i, names in enumerate(self._shards):
            final = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            self._shard(i).rename(self.folder / final)
            index |= dict.fromkeys(names, final)
        content = {"metadata": {"total_size": self._written}, "weight_map": index}
        (self.folder / INDEX).write_text(json.dumps(content, indent=1))


def settle(folder: Path) -> None:
    """Remove what is only needed to continue writing."""
    for path in folder.glob("shard-*.data"):
        path.unlink()


def _copy(source: BinaryIO, target: BinaryIO, length: int) -> None:
    while length:
        part = source.read(min(COPIED, length))
        if not part:
            raise OSError("what was written is not there any more")
        target.write(part)
        length -= len(part)
