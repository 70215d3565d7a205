"""Safetensors files, written while their tensors are made."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

SHARD_BYTES = 4 * 2**30
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
COPIED = 2**24  # bytes at a time
ALIGNED = 8


class Place(NamedTuple):
    """A tensor in the data of a shard that is not finished."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    length: int
    itemsize: int


class Writer:
    """Appends tensors to a file at once, and makes a shard of it whenever it is full.

    A tensor is out of memory when it was added. Shards have their tensors in the order in which the
    safetensors library writes them: wide numbers first, so that all are aligned, then by name.

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
        self._pending: dict[str, Place] = {}
        self._size = 0  # of what is pending
        self._shards: list[list[str]] = []
        self._written = 0
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def _data(self) -> Path:
        return self.folder / "shard.data"

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
        place = Place(NAMES[given.dtype], tuple(given.shape), self._size, size, given.itemsize)
        self._pending[self.rename(name, tensor)] = place
        self._size += size
        self._written += size

    def state(self) -> dict[str, Any]:
        """What :meth:`go_on` needs to know of all that was added so far."""
        return {
            "pending": self._pending,
            "size": self._size,
            "shards": self._shards,
            "written": self._written,
        }

    def go_on(self, state: dict[str, Any]) -> None:
        """Be where another writer to this folder was; what that one wrote later is forgotten."""
        pending = state["pending"].items()
        self._pending = {n: Place(d, tuple(s), *rest) for n, (d, s, *rest) in pending}
        self._size, self._written = state["size"], state["written"]
        self._shards = [[*names] for names in state["shards"]]

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
        path = self.folder / f"shard-{len(self._shards)}.safetensors"
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
        """Write what is pending, then give the shards the names that transformers looks for."""
        if self._pending:
            self._flush()
        self._data.unlink(missing_ok=True)
        count = len(self._shards)
        if count == 1:
            (self.folder / "shard-0.safetensors").rename(self.folder / "model.safetensors")
            return
        index: dict[str, str] = {}
        for i, names in enumerate(self._shards):
            final = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            (self.folder / f"shard-{i}.safetensors").rename(self.folder / final)
            index |= dict.fromkeys(names, final)
        content = {"metadata": {"total_size": self._written}, "weight_map": index}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=1))


def _copy(source: BinaryIO, target: BinaryIO, length: int) -> None:
    while length:
        part = source.read(min(COPIED, length))
        if not part:
            raise OSError("what was written is not there any more")
        target.write(part)
        length -= len(part)
