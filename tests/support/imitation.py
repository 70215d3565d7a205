"""An Apple GPU as torch shows it, imitated on the CPU: no float64, and nothing mixed with the CPU.

Tensors "on" it are ordinary ones whose storage carries a mark, which views, parameters and `.data`
share with it. Functions of tensors see to what names a device and to copies between the two. Below
them every operator is looked at: it may not have operands of both, give float64, or be one that
Apple's GPUs don't have. What an operator makes of marked operands is marked.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

MPS = torch.device("mps", 0)
aten = torch.ops.aten
attention = torch.nn.functional.scaled_dot_product_attention
COPIES = (aten.copy_.default, aten.copy.default)
MISSING = ("_linalg_eigh", "_linalg_svd", "linalg_eig", "linalg_qr", "linalg_lstsq", "geqrf")
NO_FLOAT64 = (
    "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. "
    "Please use float32 instead."
)


@contextmanager
def apple() -> Iterator[None]:
    """While this lasts, "mps" is a device."""
    watch = _Operators()
    with patch.object(torch, "Event", MagicMock()), watch, _Functions(watch):
        yield  # transformers waits for events while it writes; here all is done at once


def on_mps(tensor: Tensor) -> bool:
    """Whether a tensor is on the imitated device."""
    return tensor.device.type == "mps" or _marked(tensor)


def _marked(tensor: Tensor) -> bool:
    return not tensor.is_meta and getattr(tensor.untyped_storage(), "on_mps", False)


def _mark(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.float64:
        raise TypeError(NO_FLOAT64)
    tensor.untyped_storage().on_mps = True  # type: ignore[attr-defined]
    return tensor


def _together(name: str, given: Sequence[Tensor]) -> None:
    """Refuse operands of both devices; numbers, which have no axes, may be of either."""
    if not all(_marked(t) for t in given if t.dim()):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {name} found mps:0 and cpu!"
        )


def _listed(index: Any) -> Any:
    """An index whose lists are on the device, too."""
    if isinstance(index, list):
        return _mark(torch.tensor(index))
    return tuple(map(_listed, index)) if isinstance(index, tuple) else index


class _Operators(TorchDispatchMode):
    """Looks at every operator, but for those inside a function that says where all of it is."""

    inside: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.inside is not None:
            found = func(*args, **kwargs)
            return tree_map_only(Tensor, _mark, found) if self.inside == "mps" else found
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        there = [t for t in given if _marked(t)]
        if not there:
            return func(*args, **kwargs)
        name = func.name().partition("::")[2].partition(".")[0]
        if name in MISSING:
            raise NotImplementedError(f"The operator 'aten::{name}' is not implemented for MPS.")
        if func in COPIES:
            into, source = args[:2]
            if source.dtype != into.dtype == torch.float64:
                raise TypeError(NO_FLOAT64)  # the numbers are converted before they leave
            return func(*args, **kwargs)
        _together(name, given)
        return tree_map_only(Tensor, _mark, func(*args, **kwargs))


class _Functions(TorchFunctionMode):
    """Sees to devices that are named, and to copies from one to the other."""

    def __init__(self, operators: _Operators) -> None:
        super().__init__()
        self._operators = operators

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        own = args[0] if args and isinstance(args[0], Tensor) else None
        if own is not None and func == Tensor.device.__get__:
            return MPS if _marked(own) else func(own)
        if own is not None and func == Tensor.is_mps.__get__:
            return _marked(own)
        if func is Tensor.numpy and _marked(own):
            raise TypeError("can't convert mps:0 device type tensor to numpy.")
        if func is Tensor.cpu:
            return self._moved(own, "cpu", None)
        if func is Tensor.to:
            return self._to(own, args[1:], kwargs)
        if func is attention and _marked(own):
            _together("attention", [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)])
            with self._inside("mps"):  # one operator, which the CPU may put together from others
                return func(*args, **kwargs)
        if func is Tensor.__getitem__ and _marked(own):
            return func(own, _listed(args[1]))
        wanted = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        if wanted is None or wanted.type not in ("cpu", "mps"):
            return func(*args, **kwargs)
        kwargs["device"] = "cpu"
        with self._inside(wanted.type):
            return func(*args, **kwargs)

    def _to(self, own: Tensor, args: Any, kwargs: Any) -> Tensor:
        always = kwargs.pop("copy", False)
        like = kwargs.pop("other", None)
        if args and isinstance(args[0], Tensor):
            like = args[0]
        if like is not None:
            device, dtype = MPS if _marked(like) else like.device, like.dtype
        else:
            device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        return self._moved(own, device, dtype, always)

    def _moved(
        self, own: Tensor, device: Any, dtype: torch.dtype | None, always: bool = False
    ) -> Tensor:
        dtype = dtype or own.dtype
        wanted = None if device is None else torch.device(device).type
        here = "mps" if _marked(own) else own.device.type
        if wanted in (None, here):
            return own.to(dtype, copy=always)
        if "mps" not in (wanted, here):
            return own.to(wanted, dtype, copy=always)
        if here == "mps" and dtype == torch.float64:
            raise TypeError(NO_FLOAT64)  # the numbers are converted before they leave
        with self._inside("cpu"):
            copy = own.to(dtype, copy=True)
        return _mark(copy) if wanted == "mps" else copy

    @contextmanager
    def _inside(self, device: str) -> Iterator[None]:
        self._operators.inside = device
        try:
            yield
        finally:
            self._operators.inside = None
