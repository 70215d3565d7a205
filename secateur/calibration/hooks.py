"""Hooks that feed the statistics of a block while its forward runs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.calibration.statistics import Need, Statistic
from secateur.layers.attention_secateur import RelativeAttention
from secateur.models.block import Block, mixed_bias
from secateur.utils.precision import exact


@contextmanager
def observed(block: Block, statistics: Mapping[Need, Statistic], mask: Tensor) -> Iterator[None]:
    """Feed the statistics of one block from hooks while its forward runs."""
    attention = block.attention
    projecting = False  # for the scores' own use, which the other hooks must not count

    def feed(place: str, *values: Tensor) -> None:
        for need, statistic in statistics.items():
            if need.place == place and statistic.wants_more and not projecting:
                statistic.update(*values, mask=mask)

    def heads(output: Tensor) -> Tensor:
        if attention.q_norm is not None and attention.shape.get("head_norms") == "list":
            output = output.transpose(1, 2)
        return output.reshape(*mask.shape, -1, attention.query_key)

    def query(_: nn.Module, args: Any, output: Tensor) -> None:
        feed("query", heads(output))

    def key(_: nn.Module, args: Any, output: Tensor) -> None:
        feed("key", heads(output))

    def value(_: nn.Module, args: Any, output: Tensor) -> None:
        feed("value", unbiased(output, attention.v_proj).reshape(*mask.shape, -1, attention.value))

    def mixed(_: nn.Module, args: Any) -> None:
        feed("mixed", mixed_values(block, args[0]))

    def entering(place: str) -> Callable[[nn.Module, Any], None]:
        return lambda _, args: feed(place, args[0].reshape(*mask.shape, -1))

    def scores(_: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal projecting
        if any(need.place == "scores" and s.wants_more for need, s in statistics.items()):
            projecting = True
            values = _scores(block, args, kwargs)
            projecting = False
            feed("scores", *values)

    hooks: dict[str, tuple[Any, Any]] = {
        "hidden": (block.consumer.register_forward_pre_hook, entering("hidden")),
        "attention_inputs": (
            attention.q_proj.register_forward_pre_hook,
            entering("attention_inputs"),
        ),
        "output_inputs": (attention.o_proj.register_forward_pre_hook, entering("output_inputs")),
        "mlp_inputs": (
            block.producers[0][0].register_forward_pre_hook,
            entering("mlp_inputs"),
        ),
        "query": ((attention.q_norm or attention.q_proj).register_forward_hook, query),
        "key": ((attention.k_norm or attention.k_proj).register_forward_hook, key),
        "value": (attention.v_proj.register_forward_hook, value),
        "mixed": (attention.o_proj.register_forward_pre_hook, mixed),
    }
    if block.anatomy.pre_norm is not None:
        norm = block.module.get_submodule(block.anatomy.pre_norm.mlp_norm)
        hooks["between"] = norm.register_forward_pre_hook, entering("between")
    with ExitStack() as stack:
        places = {need.place for need in statistics}
        for place, (register, hook) in hooks.items():
            if place in places:
                stack.callback(register(hook).remove)
        if "scores" in places:
            handle = attention.register_forward_pre_hook(scores, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def unbiased(output: Tensor, linear: nn.Linear) -> Tensor:
    """A linear's output without its bias.

    A value's bias reaches the output whole, as attention weights sum to one; it is folded into the
    output's bias and is no part of what has to be rebuilt.
    """
    return output if linear.bias is None else output - linear.bias


def mixed_values(block: Block, values: Tensor) -> Tensor:
    """The output projection's input without what the value bias adds to it."""
    bias = mixed_bias(block.attention)
    return values if bias is None else values - bias


def _scores(block: Block, args: Any, kwargs: Any) -> tuple[Tensor, ...]:
    """Queries, keys and values as ``PairScores`` takes them."""
    attention = block.attention
    states = args[0] if args else kwargs["hidden_states"]
    query, key, value = attention.project(states, kwargs.get("position_embeddings"))
    # u = v W_O has the inner products of v L with W_O W_Oᵀ = L Lᵀ, which is no wider than a head.
    weight = exact(attention.o_proj.weight).view(-1, attention.heads, attention.value)
    metric = torch.einsum("dhi,dhj->hij", weight, weight)
    eye = torch.eye(attention.value, dtype=metric.dtype, device=metric.device)
    tiny = 1e-9 * metric.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-200)
    root = torch.linalg.cholesky(metric + tiny[:, None, None] * eye)
    value = value.repeat_interleave(attention.num_key_value_groups, 1)
    turning = torch.arange(attention.query_key // 2, device=query.device) < block.heads.rotary // 2
    reach = (attention.sliding_window or query.shape[2]) if attention.is_causal else 0
    window = torch.tensor(reach, device=query.device)
    given = query * attention.scaling, key, value @ root.to(value), turning, window
    if isinstance(attention, RelativeAttention):
        bias = kwargs["position_bias"]
        bias = attention.bias_of(query.shape[2]) if bias is None else bias
        return *given, query.new_zeros(()), bias[0]
    return given if attention.soft_cap is None else (*given, query.new_tensor(attention.soft_cap))
