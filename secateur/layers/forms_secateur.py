"""All forms of matrices by name: layers from specs.

This file is written beside the weights, like those that it imports from.
"""

from typing import Any

import torch
from torch import Tensor

from .factored_secateur import Factored, LowRank, Spec, Ternary
from .sparse_secateur import NM, ArmorLinear, Sparse
from .structured_secateur import BlockDense, BlockShuffle, Codes, Dictionary, Monarch

LAYERS = (
    LowRank,
    Ternary,
    Sparse,
    NM,
    ArmorLinear,
    Monarch,
    BlockShuffle,
    BlockDense,
    Dictionary,
    Codes,
)
#: form → its layer
FORMS: dict[str, type[Factored]] = {layer.form: layer for layer in LAYERS}


def layer_class(spec: Any) -> type[Factored]:
    """The layer of a spec.

    Raises:
        ValueError: it is no spec, or of no form that there is.
    """
    form = spec.get("form") if isinstance(spec, dict) else None
    if not isinstance(form, str) or form not in FORMS:
        raise ValueError(f"spec {str(spec)[:200]}: its form should be one of {', '.join(FORMS)}.")
    FORMS[form].check(spec)
    return FORMS[form]


def build(spec: Any) -> Factored:
    """An uninitialised layer from its spec."""
    return layer_class(spec)(spec)


def fill(
    spec: Spec, tensors: dict[str, Tensor], bias: Tensor | None, dtype: torch.dtype
) -> Factored:
    """A layer with its tensors; those that are the model's own numbers become ``dtype``."""
    with torch.device("meta"):
        layer = build(spec)
    wanted = layer_class(spec).tensors(spec)
    state = {}
    for name, (shape, own) in wanted.items():
        found = tensors[name]
        assert tuple(found.shape) == shape, (name, tuple(found.shape), shape)
        assert own in (None, found.dtype), (name, found.dtype)
        state[name] = found.to(own or dtype).contiguous()
    if bias is not None:
        state["bias"] = bias.detach()
    layer.load_state_dict(state, assign=True)
    return layer.requires_grad_(False)
