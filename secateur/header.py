"""What the headers of weight files say, held against what a checkpoint's layers should have."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from secateur.errors import InputError
from secateur.layers.factored_secateur import Factored

NAMES = {torch.uint8: "U8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64"}
FLOATS = ("F16", "BF16", "F32", "F64")
BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}


def check_layers(source: str, folder: Path, module: nn.Module) -> None:
    """Refuse weight files that don't hold what the layers of other forms want; loads no tensor.

    ``module`` is the model without storage.

    Raises:
        InputError: a tensor is missing, or of another shape or number format than its spec says.
    """
    layers = {name: m for name, m in module.named_modules() if isinstance(m, Factored)}
    if not layers:
        return
    there = dict(tensors(source, folder))
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
            found, kind = there[tensor]
            allowed = FLOATS if dtype is None else (NAMES[dtype],)
            if found != shape or kind not in allowed:
                raise InputError(
                    f"model {source!r}: {tensor} has shape {found} of {kind}, but its spec in "
                    f"config.json asks for {shape} of {' or '.join(allowed)}; they are not from "
                    f"the same model."
                )


def tensors(source: str, folder: Path) -> Iterator[tuple[str, tuple[tuple[int, ...], str]]]:
    """The name, shape and number format of every tensor in the files of a folder.

    Raises:
        InputError: a file is damaged.
    """
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (it is no mapping)
                    part = file.get_slice(name)
                    yield name, (tuple(part.get_shape()), part.get_dtype())
        except SafetensorError as error:
            raise InputError(f"model {source!r}: {path.name} is damaged: {error}.") from error
