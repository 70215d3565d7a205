"""Which stock class has the shapes of a compressed model, and why none has."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from secateur.apply.save import as_written, attention_changed
from secateur.data.tasks import PREFIX
from secateur.export.gguf.shapes import CANDIDATES as IN_LLAMA
from secateur.export.gguf.shapes import STEADY
from secateur.models.block import Block
from secateur.models.linear_ops import inputs_by_outputs
from secateur.models.model import Model
from secateur.utils.errors import InputError

#: has keys and values of unequal width; everything else about it can be turned off
UNEQUAL = "mimo_v2_flash"
#: classes that compute the same as a family, but take other shapes; the first that fits is taken
ALSO = {
    "llama": ("mistral", UNEQUAL),
    "mistral": ("llama", UNEQUAL),
    "qwen2": ("llama", "mistral", UNEQUAL),
}
#: config keys that those have in common
COMMON = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "hidden_act", "max_position_embeddings"),
    *("initializer_range", "rms_norm_eps", "use_cache", "tie_word_embeddings", "rope_parameters"),
    *("attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id"),
)
SHOWN = 3
PAIRS = ".rope_pairs"
REASONS = (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError)


@dataclass(frozen=True)
class Sizes:
    """Sizes that all layers share: MLP width, heads, KV heads, key width, value width."""

    width: int
    heads: int
    kv_heads: int
    query_key: int
    value: int


@dataclass(frozen=True)
class Stock:
    """A stock model without weights that has the shapes of a compressed model.

    Attributes:
        module: it.
        ratio: what queries are multiplied by, as its scores have another scale.
        pairs: columns of the model's rotary tables that its heads turn by, in order; None where
            they are all of them.
    """

    module: PreTrainedModel
    ratio: float
    pairs: tuple[int, ...] | None


def common_sizes(model: Model) -> Sizes:
    """The sizes of all layers.

    Raises:
        InputError: they are not the same, or something is gone; the message names the units.
    """
    if "residual" in (getattr(model.config, "secateur", None) or {}):
        raise InputError(
            f"model {model.source!r}: no stock class has the shortcuts of a sliced residual "
            f"stream. Narrow the original by a method that keeps the stream, e.g. auto."
        )
    by_kind: dict[str, list[tuple[int, ...]]] = {"mlp": [], "heads": []}
    by_kind |= {"query_key": [], "value_output": []}
    for block in model.blocks:
        a = block.attention.module
        by_kind["mlp"].append((inputs_by_outputs(block.mlp.consumer).shape[0],))
        by_kind["heads"].append((a.heads, a.kv_heads))
        by_kind["query_key"].append((a.query_key,))
        by_kind["value_output"].append((a.value,))
    _refuse(model, by_kind)
    ((width,), heads, (query_key,), (value,)) = (sizes[0] for sizes in by_kind.values())
    return Sizes(width, heads[0], heads[1], query_key, value)


def _refuse(model: Model, by_kind: dict[str, list[tuple[int, ...]]]) -> None:
    said = []
    for kind, sizes in by_kind.items():
        if len(set(sizes)) == 1 and min(sizes[0]) > 0:
            continue
        each = [f"layers.{i}.{kind} {size[-1]}" for i, size in enumerate(sizes)]
        differing = [
            next(i for i, s in enumerate(sizes) if s == size) for size in dict.fromkeys(sizes)
        ]
        shown = ", ".join(each[i] for i in differing[:SHOWN])
        more = len(differing) - SHOWN
        said.append(shown + (f" and {more} more sizes" if more > 0 else ""))
    if said:
        gone = any(min(size) == 0 for sizes in by_kind.values() for size in sizes)
        raise InputError(
            f"model {model.source!r}: a stock class has one size for all layers, and here are "
            f"{'; '.join(said)}{' (0 is gone)' if gone else ''}. {advice(model)}"
        )


def advice(model: Model) -> str:
    """What to do if no stock class fits."""
    family = str(model.config.model_type).removeprefix(PREFIX)
    file = ", or write a file for llama.cpp (--to gguf)" if family in IN_LLAMA else ""
    return (
        f"Compress the original with --tier plain, which gives all MLPs one width and narrows "
        f"nothing else, or edit the sizes in its plan and apply that (--plan){file}."
    )


def stock_of(model: Model, sizes: Sizes) -> Stock:
    """The first stock class with the shapes of a model, without weights.

    Raises:
        InputError: there is none; the message says why of each.
    """
    family = str(model.config.model_type).removeprefix(PREFIX)
    pairs, obstacle = _pairs(model)
    reasons: dict[str, list[str]] = {} if obstacle is None else {obstacle: []}
    unequal = (
        f"keys and values have one width, and here are layers.0.query_key {sizes.query_key} and "
        f"layers.0.value_output {sizes.value}"
    )
    for model_type in (family, *ALSO.get(family, ())) if obstacle is None else ():
        if model_type != family and _windows(model.config):
            reasons.setdefault("no sliding windows", []).append(model_type)
            continue
        if model_type != UNEQUAL and sizes.query_key != sizes.value:
            reasons.setdefault(unequal, []).append(model_type)
            continue
        try:
            config = AutoConfig.for_model(model_type, **_fields(model, model_type, sizes, pairs))
            with torch.device("meta"):
                module = model.use.opener.from_config(config)
        except REASONS as error:
            why = str(error).strip().splitlines()[-1].strip().rstrip(".")  # the first is a title
            reasons.setdefault(why, []).append(model_type)
            continue
        ratio = _ratio(model, module)
        obstacle = _obstacle(model, module, ratio)
        if obstacle is None:
            return Stock(module, ratio, pairs)
        reasons.setdefault(obstacle, []).append(model_type)
    said = "; ".join(f"{', '.join(of)}: {why}" if of else why for why, of in reasons.items())
    raise InputError(
        f"model {model.source!r}: no stock class has its shapes. {said}. {advice(model)}"
    )


def _fields(
    model: Model, model_type: str, sizes: Sizes, pairs: tuple[int, ...] | None
) -> dict[str, Any]:
    """Config fields of a class."""
    config, anatomy = model.config, model.anatomy
    assert anatomy is not None
    given = config.to_dict()
    own = model_type == str(given.pop("model_type")).removeprefix(PREFIX)
    for name in ("secateur", "auto_map", "architectures", "transformers_version", "dtype"):
        given.pop(name, None)
    fields = given if own else {name: given[name] for name in COMMON if name in given}
    fields[anatomy.width_key if own else "intermediate_size"] = sizes.width
    dense = model.blocks[0].layout
    if not own or (sizes.heads, sizes.kv_heads) != (dense.heads, dense.kv_heads):
        fields |= {"num_attention_heads": sizes.heads, "num_key_value_heads": sizes.kv_heads}
    if (
        "head_dim" in fields
        or sizes.query_key * sizes.heads != dense.width * dense.heads
        or not own
    ):
        fields["head_dim"] = sizes.query_key
    if pairs is not None:
        fields["rope_parameters"] = longrope(model, pairs)
    for name, has in zip(("attention_bias", "mlp_bias"), _biased(model), strict=True):
        if has and (name in fields or model_type == "llama" or name == "attention_bias"):
            fields[name] = True
    if model_type == "mistral" and not own:
        fields["sliding_window"] = None
    if model_type == UNEQUAL:
        layers = len(model.blocks)
        rope = {**fields["rope_parameters"], "partial_rotary_factor": 1.0}
        fields |= {
            "v_head_dim": sizes.value,
            "attention_value_scale": 1.0,
            "layer_types": ["full_attention"] * layers,
            "mlp_layer_types": ["dense"] * layers,
            "rope_parameters": {"full_attention": rope},
        }
    return fields


def _biased(model: Model) -> tuple[bool, bool]:
    """Whether any attention has a bias, and whether any MLP has one."""
    attention = any(block.attention.module.shape["bias"] for block in model.blocks)
    mlp = any(linear["bias"] for block in model.blocks for linear in block.linears.values())
    return attention, mlp


def _windows(config: Any) -> bool:
    """Whether some layers have a sliding window."""
    windowed = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    return windowed or (
        str(config.model_type).removeprefix(PREFIX) == "mistral"
        and config.sliding_window is not None
    )


def columns(block: Block) -> list[list[int]] | None:
    """Columns of the rotary tables for each KV head; None without rotation."""
    attention = block.attention.module
    if attention.rotary == "none":
        return None
    if attention.rotary == "chosen":
        found: list[list[int]] = attention.rope_pairs.tolist()
        return found
    return [[*range(block.layout.rotary // 2)]] * attention.kv_heads


def _pairs(model: Model) -> tuple[tuple[int, ...] | None, str | None]:
    """The columns that all heads of all layers share, None if these are all columns; or an
    obstacle.
    """
    first: tuple[int, str] | None = None
    shared: list[int] = []
    for block in model.blocks:
        half = block.layout.rotary // 2
        for head in columns(block) or ():
            ordered = sorted(head)
            if block.attention.module.rotary == "chosen" and ordered and ordered[-1] >= half:
                return None, f"{_unit(block)} has dims that don't turn with the position"
            if first is None:
                first, shared = (block.index, _unit(block)), ordered
            elif ordered != shared:
                where = "its own KV heads" if block.index == first[0] else first[1]
                return None, (
                    f"{_unit(block)} turns by other rotary pairs than {where}, and a stock class "
                    f"has one set of them"
                )
    if first is None or shared == [*range(model.blocks[0].layout.rotary // 2)]:
        return None, None
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type") not in STEADY:
        return None, f"a subset of its rotary pairs has no form beside rope type {rope!r:.80}"
    return tuple(shared), None


def _unit(block: Block) -> str:
    return f"layers.{block.index}.query_key"


def longrope(model: Model, pairs: Sequence[int]) -> dict[str, Any]:
    """Rope parameters of a subset of the rotary pairs.

    A class makes θ^(-2i/n) / f_i of n dims, so f_i is that over the frequency that is wanted. With
    long and short factors alike, the length of the text is of no matter.
    """
    table: Any = model.module.base_model.rotary_emb
    base = float(model.config.rope_parameters["rope_theta"])
    wanted: Tensor = table.inv_freq.cpu().double()[list(pairs)]
    made = base ** (-torch.arange(len(pairs), dtype=torch.float64) / len(pairs))
    factors = (made / wanted).tolist()
    return {
        "rope_type": "longrope",
        "rope_theta": base,
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "attention_factor": float(table.attention_scaling),
        "original_max_position_embeddings": model.config.max_position_embeddings,
    }


def _ratio(model: Model, module: PreTrainedModel) -> float:
    """The softmax scale of the model divided by that of a stock class."""
    anatomy, block = model.anatomy, model.blocks[0]
    assert anatomy is not None
    if not attention_changed(block.attention):
        return 1.0
    stock: Any = module.base_model.get_submodule(f"{anatomy.blocks}.0.{anatomy.attention}")
    return float(block.attention.module.scaling) / float(
        getattr(stock, "scaling", block.attention.module.scaling)
    )


def _obstacle(model: Model, module: PreTrainedModel, ratio: float) -> str | None:
    """Why a class does not compute the same as the model, or None."""
    changed = [block for block in model.blocks if attention_changed(block.attention)]
    if any(block.layout.pairs != sorted(block.layout.pairs) for block in changed):
        return "its rotary pairs are neighbours, and here they are in halves"
    if ratio != 1 and any(block.attention.module.q_norm is not None for block in changed):
        return "a norm stands between queries and scores, whose scale is another"
    there, wanted = (
        {name: tuple(tensor.shape) for name, tensor in m.items() if not name.endswith(PAIRS)}
        for m in (held(model), module.state_dict())
    )
    biases = {name for name in wanted if name.endswith(".bias")}
    lacking = sorted(n for n in there if n not in wanted)
    other = sorted(n for n in wanted if n not in there and n not in biases)
    other += sorted(n for n in wanted if n in there and there[n] != wanted[n])
    if lacking:
        return f"no {lacking[0]}" + (f" ({len(lacking)} such)" if lacking[1:] else "")
    if other:
        name = other[0]
        return f"its {name} has shape {wanted[name]}, and here is {there.get(name, 'none')}"
    return None


def held(model: Model) -> dict[str, Tensor]:
    """The model's tensors by the names under which they are written."""
    return as_written(model, lambda module: module.state_dict())


def conform(model: Model, stock: Stock) -> None:
    """Reorder the rotary pairs of every head and rescale queries to the stock scale, in place.

    The model computes the same as before.
    """
    for block in model.blocks:
        if not attention_changed(block.attention):
            continue
        a = block.attention.module
        with torch.no_grad():
            if a.rotary == "chosen":
                order = a.rope_pairs.argsort(-1)
                a.rope_pairs.copy_(a.rope_pairs.gather(-1, order))
                dims = torch.cat((order, order + a.query_key // 2), -1)  # (kv heads, dims)
                for linear, heads in ((a.q_proj, a.heads), (a.k_proj, a.kv_heads)):
                    own = dims.repeat_interleave(heads // a.kv_heads, 0)
                    rows = own + a.query_key * torch.arange(heads, device=own.device).unsqueeze(1)
                    for tensor in (linear.weight, linear.bias):
                        if tensor is not None:
                            tensor.copy_(tensor[rows.flatten()])
            for tensor in (a.q_proj.weight, a.q_proj.bias) if stock.ratio != 1 else ():
                if tensor is not None:
                    tensor.mul_(stock.ratio)
        a.scaling = a.scaling / stock.ratio
