"""What one rank has solved, told to the others as tensors and plain data."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.distributed.collectives import Ranks
from secateur.layers.factored_secateur import Factored
from secateur.layers.forms_secateur import build
from secateur.layers.integers import Integers, unpacked
from secateur.structure.narrowing import Narrowing

TENSORS = ("keep", "encode", "consumer", "bias")


def gather_narrowings(own: Mapping[str, Narrowing], ranks: Ranks) -> dict[str, Narrowing]:
    """What all ranks have solved, by the names of the units."""
    if ranks.alone:
        return {**own}
    found = dict(own)
    for part in ranks.all_gather({name: as_message(each) for name, each in own.items()}):
        found |= {name: from_message(each) for name, each in part.items() if name not in own}
    return found


def broadcast_narrowing(solve: Callable[[], Narrowing], ranks: Ranks) -> Narrowing:
    """What the leader solves, on every rank."""
    if ranks.alone:
        return solve()
    return from_message(ranks.broadcast(lambda: as_message(solve())))


def as_message(narrowing: Narrowing) -> dict[str, Any]:
    """A narrowing as plain data and tensors."""
    layers = {path: _layer_message(layer) for path, layer in narrowing.layers.items()}
    return {**{name: getattr(narrowing, name) for name in TENSORS}, "layers": layers}


def from_message(message: Mapping[str, Any]) -> Narrowing:
    """The narrowing that :func:`as_message` has taken apart."""
    layers = {path: _layer(found) for path, found in message["layers"].items()}
    for layer in layers.values():
        if isinstance(layer, Factored):
            layer.follow(layers)
    return Narrowing(**{name: message[name] for name in TENSORS}, layers=layers)


def _layer_message(layer: nn.Module) -> dict[str, Any]:
    state: dict[str, Tensor] = layer.state_dict()
    if isinstance(layer, Factored):
        return {"spec": layer.spec, "state": state}
    assert isinstance(layer, Integers), type(layer)
    like = layer.weight.new_empty(0)  # the dense weight is made again; its number format is not
    return {"bits": layer.bits, "group": layer.group, "state": state, "like": like}


def _layer(message: Mapping[str, Any]) -> nn.Module:
    state: dict[str, Tensor] = message["state"]
    if "spec" in message:
        with torch.device("meta"):
            layer = build(message["spec"])
        layer.load_state_dict(state, assign=True)
        return layer.requires_grad_(False)
    bits, columns = message["bits"], int(state["weight_shape"][1])
    return Integers(
        bits,
        message["group"],
        unpacked(state["weight_packed"], bits, columns),
        state["weight_scale"],
        bias=state.get("bias"),
        dtype=message["like"].dtype,
    )
