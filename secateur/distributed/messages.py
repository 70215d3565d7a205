"""Values that pass between ranks: JSON with tensors in it. Nothing is pickled."""

import json
from typing import Any

import torch
from torch import Tensor

#: None, a truth value, a number, a string or a tensor, or a list or dict (by strings) of these
Value = Any
TENSOR = "__tensor__"  # the key that stands for a tensor in JSON
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


def pack(value: Value) -> tuple[bytes, list[Tensor]]:
    """A value as JSON, and the tensors in it in the order in which the JSON names them.

    Tuples arrive as lists.

    Raises:
        TypeError: something in it is neither plain data nor a tensor.
    """
    tensors: list[Tensor] = []

    def described(part: Any) -> dict[str, Any]:
        if not isinstance(part, Tensor):
            raise TypeError(f"a {type(part).__name__} can't be sent to other ranks")
        tensors.append(part.detach().contiguous())
        return {TENSOR: str(part.dtype).removeprefix("torch."), "shape": [*part.shape]}

    return json.dumps(value, default=described).encode(), tensors


def unpack(content: bytes, device: torch.device) -> tuple[Value, list[Tensor]]:
    """A packed value with room for its tensors on a device, and that room, still to be filled.

    Raises:
        ValueError: the content is not what :func:`pack` makes.
    """
    tensors: list[Tensor] = []

    def room(part: dict[str, Any]) -> Any:
        if TENSOR not in part:
            return part
        if part[TENSOR] not in DTYPES:
            raise ValueError(f"a message names the number format {part[TENSOR]!r}")
        tensors.append(torch.empty(part["shape"], dtype=DTYPES[part[TENSOR]], device=device))
        return tensors[-1]

    return json.loads(content, object_hook=room), tensors
