"""Narrowing without narrowing: hooks on a stock dense model that do what a narrow one should.

The MLP's consumer reads the kept channels alone, the output projection reads the kept heads alone
or mixed values through E, dropped query and key coordinates are set to zero. No shape changes in
front of either consumer, and none of the package's attention code is involved.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.structure.narrowing import Narrowing
from tests.support.families import FAMILIES, interleaved

Narrowings = Mapping[int, Mapping[str, Narrowing]]  # block, kind of unit


def head_rows(name: str, config: Any) -> dict[str, tuple[str, Tensor]]:
    """For q, k and v: the module that makes it and the outputs (heads, width) it takes there."""
    family, heads = FAMILIES[name], config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if config.model_type == "falcon":
        kv_heads = config.num_kv_heads if config.new_decoder_architecture else 1
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    q = torch.arange(heads * width).view(heads, width)
    k = torch.arange(kv_heads * width).view(kv_heads, width)
    if family.fused == "blocks":
        fused = family.names[0]
        return {
            "q": (fused, q),
            "k": (fused, k + heads * width),
            "v": (fused, k + (heads + kv_heads) * width),
        }
    if family.fused == "heads":
        rows = torch.arange((heads + 2 * kv_heads) * width).view(kv_heads, -1, width)
        parts = (rows[:, :-2].flatten(0, 1), rows[:, -2], rows[:, -1])
        return {n: (family.names[0], part) for n, part in zip("qkv", parts, strict=True)}
    return dict(zip("qkv", zip(family.names, (q, k, k), strict=False), strict=True))


def rotary_width(config: Any, width: int) -> int:
    """How many dims of a head the stock model rotates; the whole head where none does."""
    rope = getattr(config, "rope_parameters", None) or {}
    return int(width * rope.get("partial_rotary_factor", 1.0))


def stock_coordinates(keep: Tensor, name: str, config: Any, width: int, block: int) -> Tensor:
    """Kept coordinates in the stock layout, where rotating dims stand before those at rest."""
    rotary, place = rotary_width(config, width), []
    for half in (0, 1):
        rotating, rest = rotary // 2, (width - rotary) // 2
        if interleaved(name, block):
            place += [2 * i + half for i in range(rotating)]
        else:
            place += [half * rotating + i for i in range(rotating)]
        place += [rotary + half * rest + i for i in range(rest)]
    return torch.tensor(place)[keep]


@contextmanager
def narrowed(model: Any, name: str, narrowings: Narrowings) -> Iterator[Any]:
    """The stock ``model`` with hooks; they are gone again afterwards."""
    family = FAMILIES[name]
    with ExitStack() as stack:
        for index, own in narrowings.items():
            block: nn.Module = model.base_model.get_submodule(family.path(index))
            if "block" in own:
                hook = _handed_on(own["block"])
                stack.callback(block.register_forward_hook(hook, with_kwargs=True).remove)
            attention = block.get_submodule(family.attention)
            rows = head_rows(name, model.config)
            if "mlp" in own:
                consumer = model.base_model.get_submodule(family.consumer_path(index))
                hook = _kept_channels(own["mlp"], consumer)
                stack.callback(consumer.register_forward_hook(hook).remove)
            if "heads" in own:
                output = attention.get_submodule(family.names[-1])
                hook = _kept_heads(own["heads"], output, len(rows["k"][1]))
                stack.callback(output.register_forward_hook(hook).remove)
            edits = {}
            if "query_key" in own:
                width = rows["q"][1].shape[1]
                keep = own["query_key"].keep
                keep = stock_coordinates(keep, name, model.config, width, index)
                group = len(rows["q"][1]) // len(keep)
                edits["q"] = _zeroed(rows["q"][1], keep.repeat_interleave(group, 0))
                if (encode := own["query_key"].encode) is not None:
                    place = stock_coordinates(torch.arange(width), name, model.config, width, index)
                    heads = keep.repeat_interleave(group, 0), encode.repeat_interleave(group, 0)
                    edits["q"] = _mapped(rows["q"][1], place, *heads)
                edits["k"] = _zeroed(rows["k"][1], keep)
            if "value_output" in own:
                bias = attention.get_submodule(rows["v"][0]).bias
                bias = torch.zeros(()) if bias is None else bias[rows["v"][1]]
                output = attention.get_submodule(family.names[-1])
                hook = _mixed_values(own["value_output"], output, bias)
                stack.callback(output.register_forward_hook(hook).remove)
            for which, edit in edits.items():
                handle = attention.get_submodule(rows[which][0]).register_forward_hook(edit)
                stack.callback(handle.remove)
        yield model


def _weight_and_bias(linear: Any) -> tuple[Tensor, Tensor | float]:
    """(inputs, outputs), whichever way round the class keeps it, and the bias."""
    weight = linear.weight.t() if isinstance(linear, nn.Linear) else linear.weight
    return weight, 0.0 if linear.bias is None else linear.bias


def _handed_on(narrowing: Narrowing) -> Any:
    """The block's input, and the constant that stands for the block."""

    def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: Any, output: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        if narrowing.bias is not None:
            states = states + narrowing.bias
        return (states, *output[1:]) if isinstance(output, tuple) else states

    return hook


def _kept_channels(narrowing: Narrowing, consumer: Any) -> Any:
    weight, bias = _weight_and_bias(consumer)
    rows = weight[narrowing.keep] if narrowing.consumer is None else narrowing.consumer
    bias = bias if narrowing.bias is None else bias + narrowing.bias

    def hook(_: nn.Module, args: tuple[Tensor, ...], __: Any) -> Tensor:
        return args[0][..., narrowing.keep] @ rows.to(args[0].dtype) + bias

    return hook


def _kept_heads(narrowing: Narrowing, output: Any, kv_heads: int) -> Any:
    """What query heads of dropped KV heads have mixed, value biases included, is not read."""
    weight, bias = _weight_and_bias(output)
    each = len(weight) // kv_heads  # coordinates of the query heads that share a KV head
    kept = (narrowing.keep.unsqueeze(1) * each + torch.arange(each)).flatten()
    rows = weight[kept] if narrowing.consumer is None else narrowing.consumer
    bias = bias if narrowing.bias is None else bias + narrowing.bias

    def hook(_: nn.Module, args: tuple[Tensor, ...], __: Any) -> Tensor:
        return args[0][..., kept] @ rows.to(args[0].dtype) + bias

    return hook


def _zeroed(rows: Tensor, keep: Tensor) -> Any:
    dropped = [
        int(row)
        for head, kept in zip(rows, keep.tolist(), strict=True)
        for i, row in enumerate(head)
        if i not in kept
    ]

    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[..., dropped] = 0
        return output

    return hook


def _mapped(rows: Tensor, place: Tensor, keep: Tensor, encode: Tensor) -> Any:
    """Every head's coordinates in ``place`` through E into the kept ones, zero elsewhere."""

    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        made = output.clone()
        made[..., rows.flatten()] = 0
        for row, kept, matrix in zip(rows, keep, encode, strict=True):
            made[..., row[kept]] = output[..., row[place]] @ matrix.to(output.dtype)
        return made

    return hook


def _mixed_values(narrowing: Narrowing, output: Any, bias: Tensor) -> Any:
    """``bias`` is the value's, (kv heads, width); attention passes it on as it is."""
    weight, constant = _weight_and_bias(output)
    encode, consumer = narrowing.encode, narrowing.consumer
    group = len(weight) // (len(encode) * encode.shape[1])
    basis = encode.repeat_interleave(group, 0)  # heads, width, k
    bias = bias.expand(encode.shape[:2]).repeat_interleave(group, 0).to(weight.dtype)

    def hook(_: nn.Module, args: tuple[Tensor, ...], __: Any) -> Tensor:
        mixed = args[0].unflatten(-1, basis.shape[:2]) - bias
        kept = torch.einsum("bthn,hnk->bthk", mixed, basis.to(mixed.dtype)).flatten(2)
        return kept @ consumer.to(kept.dtype) + bias.flatten() @ weight + constant

    return hook
