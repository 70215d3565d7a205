"""Headers of weight files, and checks against the layers of a checkpoint."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from secateur.io.safe_parse import HostileError, opened, parse_json, plain_name, read_bytes
from secateur.layers.factored_secateur import Factored
from secateur.utils.errors import InputError, shown

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
FLOATS = ("F16", "BF16", "F32", "F64")
BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
MAX_HEADER = 100_000_000  # bytes, as in the library
MAX_INDEX = 2**26
MAX_DIMS = 16
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Entry(NamedTuple):
    """A tensor in a file, in bytes ``start`` to ``end`` of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """Where each tensor of a safetensors file lies, in the order in which they lie there.

    Eight bytes with the length of the header, the header as JSON, then the tensors one behind the
    other. All of it is held against the size of the file, and no tensor is read.

    Raises:
        InputError: it can't be read, or is no such file or not a whole one.
    """
    return read_whole(path)[0]


def read_whole(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The same, and the metadata of the header.

    Raises:
        InputError: likewise.
    """
    named = f"weight file {str(path)!r}"
    try:
        header, behind, size = _parts(path)
        entries = sorted(_entries(header, behind), key=lambda pair: (pair[1].start, pair[1].end))
        end = behind
        for name, entry in entries:
            if entry.start != end:
                fault = "overlaps what is before it" if entry.start < end else "leaves a hole there"
                raise HostileError(f"tensor {shown(name)} {fault}")
            end = entry.end
        if end != size:
            raise HostileError(f"its header speaks of {end} bytes, and it has {size}")
    except OSError as error:
        raise InputError(f"{named}: {error.strerror}.") from error
    except HostileError as error:
        raise InputError(f"{named} is corrupt or cut short: {error}. Fetch it again.") from error
    return dict(entries), header.get("__metadata__", {})


def _parts(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header, the offset of its end, and the size of the file."""
    with opened(path) as (file, size):
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise HostileError(f"a header of {length} bytes in a file of {size}")
        if length > MAX_HEADER:
            raise HostileError(f"a header of {length} bytes; none has more than {MAX_HEADER}")
        header = parse_json(file.read(length))
    if not isinstance(header, dict):
        raise HostileError("its header is no JSON object")
    return header, 8 + length, size


def _entries(header: dict[str, Any], behind: int) -> Iterator[tuple[str, Entry]]:
    for name, said in header.items():
        if name == "__metadata__":
            if not isinstance(said, dict) or not all(isinstance(v, str) for v in said.values()):
                raise HostileError("its metadata are not strings by name")
            continue
        if not isinstance(said, dict) or said.keys() != {"dtype", "shape", "data_offsets"}:
            raise HostileError(f"tensor {shown(name)} should have dtype, shape and data_offsets")
        dtype, shape, offsets = said["dtype"], said["shape"], said["data_offsets"]
        if not isinstance(dtype, str) or dtype not in BYTES:
            raise HostileError(f"tensor {shown(name)} has the unknown number format {shown(dtype)}")
        if not _counts(shape) or len(shape) > MAX_DIMS:
            raise HostileError(f"tensor {shown(name)} can't have the shape {shown(shape)}")
        if not _counts(offsets) or len(offsets) != 2:
            raise HostileError(f"tensor {shown(name)} can't have the offsets {shown(offsets)}")
        first, last = offsets
        if last - first != math.prod(shape) * BYTES[dtype]:
            raise HostileError(
                f"tensor {shown(name)} of shape {tuple(shape)} and {dtype} takes "
                f"{math.prod(shape) * BYTES[dtype]} bytes, and has {last - first}"
            )
        yield name, Entry(dtype, tuple(shape), behind + first, behind + last)


def _counts(value: Any) -> bool:
    """Whether a value is a list of integers that can be sizes or offsets in a file."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def read_index(folder: Path) -> dict[str, str] | None:
    """The file of each tensor according to the index of shards; None without an index.

    Raises:
        InputError: the index is damaged, or names what is no weight file of this folder.
    """
    path = folder / INDEX
    if not path.exists() and not path.is_symlink():
        return None
    named = f"index {str(path)!r}"
    try:
        content = parse_json(read_bytes(path, MAX_INDEX, "index"))
        found = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(found, dict) or not found:
            raise HostileError("weight_map should say which file each tensor is in")
        for name, file in found.items():
            if not isinstance(file, str) or not plain_name(file, (".safetensors",)):
                raise HostileError(
                    f"tensor {shown(name)} is said to be in {shown(file)}, which is no name of a "
                    f".safetensors file beside the index"
                )
    except OSError as error:
        raise InputError(f"{named}: {error.strerror}.") from error
    except HostileError as error:
        raise InputError(f"{named} is damaged: {error}. Fetch it again.") from error
    return found


def check_layers(source: str, folder: Path, module: nn.Module) -> None:
    """Refuse weight files without the tensors that layers of other forms need; loads no tensor.

    ``module`` is the model without storage.

    Raises:
        InputError: a tensor is missing, or of another shape or number format than its spec says.
    """
    layers = {name: m for name, m in module.named_modules() if isinstance(m, Factored)}
    if not layers:
        return
    there = tensors(folder)
    for name, layer in layers.items():
        for inner, (shape, dtype) in layer.tensors(layer.spec).items():
            tensor = f"{name}.{inner}"
            if f"{tensor}_packed" in there:
                continue  # integers, which the library holds against the config
            if tensor not in there:
                raise InputError(
                    f"model {source!r}: {tensor} is missing, which a layer of form {layer.form!r} "
                    f"needs. Fetch the model again."
                )
            kind, found, *_ = there[tensor]
            allowed = FLOATS if dtype is None else (NAMES[dtype],)
            if found != shape or kind not in allowed:
                raise InputError(
                    f"model {source!r}: {tensor} has shape {found} of {kind}, but its spec in "
                    f"config.json asks for {shape} of {' or '.join(allowed)}; they are not from "
                    f"the same model."
                )


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder that transformers would read; empty if there are none.

    Raises:
        InputError: the index is damaged, or a file that it names is missing.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    files = sorted({folder / name for name in (read_index(folder) or {}).values()})
    for file in files:
        if not file.is_file():
            raise InputError(
                f"index {str(folder / INDEX)!r} names {file.name}, which is missing. Fetch it "
                f"again."
            )
    return files


def tensors(folder: Path) -> dict[str, Entry]:
    """All tensors in the weight files of a folder; raises as :func:`places` does."""
    return {name: entry for name, (_, entry) in places(folder).items()}


def places(folder: Path) -> dict[str, tuple[Path, Entry]]:
    """The weight file of each tensor in a folder, and its position there.

    Raises:
        InputError: a file is damaged or missing, or two of them have the same tensor.
    """
    found: dict[str, tuple[Path, Entry]] = {}
    for path in weight_files(folder):
        own = read_header(path)
        if twice := found.keys() & own.keys():
            name = min(twice)
            raise InputError(
                f"weight file {str(path)!r}: tensor {shown(name)} is in another file, too; "
                f"{found[name][0].name} and {path.name} both have it. Fetch the model again."
            )
        found |= {name: (path, entry) for name, entry in own.items()}
    return found
