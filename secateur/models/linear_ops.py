"""Linear layers of whatever kind and form: their weights read and set."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from secateur.layers.factored_secateur import Factored
from secateur.layers.modeling_secateur import AnyConv1D
from secateur.utils.precision import exact


def inputs_by_outputs(module: nn.Module) -> Tensor:
    """A view of a linear's or Conv1D's weight as (inputs, outputs)."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.t() if isinstance(module, nn.Linear) else weight


def dense_weight(module: nn.Module) -> Tensor:
    """The weight that a linear layer of whatever form stands for, (outputs, inputs)."""
    return module.dense() if isinstance(module, Factored) else inputs_by_outputs(module).t()


def sizes_of(linear: nn.Module) -> dict[str, Any]:
    """Its outputs, inputs and whether it has a bias, as a checkpoint has them."""
    if isinstance(linear, Factored):
        inputs, outputs = linear.in_features, linear.out_features
    else:
        inputs, outputs = inputs_by_outputs(linear).shape
    return {"out": outputs, "in": inputs, "bias": linear.bias is not None}


def may_be_empty(linear: nn.Module) -> nn.Module:
    """The linear, or for a stock Conv1D one with the same weights that may lose all its inputs."""
    if type(linear) is not Conv1D:
        return linear
    with torch.device("meta"):
        made = AnyConv1D(linear.weight.shape[1], linear.weight.shape[0])
    made.weight, made.bias = linear.weight, linear.bias
    return made


def set_linear(module: Any, weight: Tensor, bias: Tensor | None) -> None:
    """Give a linear or Conv1D other weights (outputs, inputs); its sizes follow."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    else:
        module.nx, module.nf = weight.shape[1], weight.shape[0]
        weight = weight.t()
    module.weight = nn.Parameter(weight.detach(), requires_grad=False)
    module.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)


def with_constant(bias: Tensor | None, constant: Tensor | None, like: Tensor) -> Tensor | None:
    """A bias, which may be missing, and a constant, which may be, too; of the kind of a weight."""
    if constant is None or bias is None:
        return bias if constant is None else constant.to(like)
    return (exact(bias) + constant).to(like)
