"""Which of llama.cpp's architectures can represent a model, and why not."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.data.tasks import PREFIX
from secateur.families.base import HeadLayout
from secateur.models.block import Block
from secateur.models.linear_ops import inputs_by_outputs
from secateur.models.model import Model
from secateur.utils.errors import InputError

NARROWED_PAIRS = "chosen"
#: rope types whose frequencies are the same at every length
STEADY = ("default", "linear", "llama3", "yarn")
STILL = (
    "some dims of its heads don't turn with the position, and in those architectures of llama.cpp "
    "all do"
)


@dataclass(frozen=True)
class Layer:
    """The shapes of one layer in a file.

    Attributes:
        heads: query heads; 0 where there is no attention.
        kv_heads: KV heads.
        width: of the MLP; 1, of zeros, where there is none.
    """

    heads: int
    kv_heads: int
    width: int


@dataclass(frozen=True)
class Architecture:
    """What one of llama.cpp's graphs can represent.

    Attributes:
        name: in ``general.architecture``.
        interleaved: whether neighbours are a rotary pair, and not the members of two halves.
        by_layer: whether heads and MLP widths may differ from layer to layer.
        fused: whether queries, keys and values are one matrix.
        head_norms: whether there are norms inside the heads.
        biases: which of "q" (all three inputs), "o" and "m" (the MLP) may have one.
        factors: whether every rotary frequency may have a factor.
        square: whether the heads together must be as wide as the stream.
        own_head: whether the output head may be another matrix than the embedding.
        headless: whether layers but the first may be without attention.
    """

    name: str
    interleaved: bool
    by_layer: bool = False
    fused: bool = False
    head_norms: bool = False
    biases: str = ""
    factors: bool = False
    square: bool = False
    own_head: bool = True
    headless: bool = False


LLAMA = Architecture("llama", interleaved=True, biases="qom", factors=True)
DECI = Architecture(
    "deci", interleaved=True, by_layer=True, biases="qom", factors=True, headless=True
)
QWEN2 = Architecture("qwen2", interleaved=False, biases="q", square=True)
QWEN3 = Architecture("qwen3", interleaved=False, head_norms=True)
OPENELM = Architecture(
    "openelm", interleaved=False, by_layer=True, fused=True, head_norms=True, own_head=False
)
#: by model_type, the first that will do being taken
CANDIDATES: dict[str, tuple[Architecture, ...]] = {
    "llama": (LLAMA, DECI),
    "mistral": (LLAMA, DECI),
    "qwen2": (QWEN2, LLAMA, DECI),
    "qwen3": (QWEN3, OPENELM),
}


@dataclass(frozen=True)
class Layout:
    """A model as a file represents it.

    Attributes:
        architecture: what reads it.
        layers: in order.
        head: width of a head, the same for queries, keys and values of all layers.
        pairs: the columns of the model's rotary tables that some head turns by; their places are
            those of the pairs in a head.
        factors: what llama.cpp's frequencies of a head this wide are divided by; None where they
            are the model's.
        turned: what the model multiplies its rotary tables by.
        window: tokens that see each other, where those are fewer than the positions.
    """

    architecture: Architecture
    layers: tuple[Layer, ...]
    head: int
    pairs: tuple[int, ...]
    factors: Tensor | None
    turned: float
    window: int | None

    @property
    def uniform(self) -> bool:
        """Whether all layers have the same sizes."""
        return len(set(self.layers)) == 1


def layout_of(model: Model) -> Layout:
    """The layout of a model with dense matrices.

    Raises:
        InputError: no architecture of llama.cpp holds it; the message says which units stand in the
            way, and what would do.
    """
    config = model.config
    check_family(config)
    shapes = getattr(config, "secateur", None) or {}
    if "residual" in shapes:
        raise InputError(
            f"model {model.source!r}: GGUF has no place for the shortcuts of a sliced residual "
            f"stream. Narrow the original by a method that keeps the stream, e.g. auto."
        )
    said = config_obstacle(config)
    if said is not None:
        raise InputError(f"model {model.source!r}: {said}.")
    blocks = model.blocks
    turned, wanted, base = rotary(model)
    pairs = sorted({pair for block in blocks for pair in _pairs(block).flatten().tolist()})
    if any(pair >= len(wanted) for pair in pairs):
        raise InputError(f"model {model.source!r}: {STILL}.")
    widest = max(block.attention.module.value for block in blocks)
    head = max(2 * len(pairs), widest + widest % 2, 2)
    usual = base ** (-2 * torch.arange(head // 2, dtype=torch.float64) / head)
    factors = torch.ones(head // 2, dtype=torch.float64)
    factors[: len(pairs)] = usual[: len(pairs)] / wanted[pairs]
    plain = bool(torch.allclose(factors, torch.ones_like(factors), rtol=1e-6, atol=0))
    window = sliding_window(config)
    reasons = []
    for architecture in CANDIDATES[family_of(config)]:
        layers = tuple(_layer(block, architecture) for block in blocks)
        given = (architecture, layers, head, tuple(pairs), None if plain else factors)
        layout = Layout(*given, turned, window)
        obstacle = _obstacle(layout, model)
        if obstacle is None:
            return layout
        reasons.append(f"{architecture.name}: {obstacle}")
    raise InputError(
        f"model {model.source!r}: no architecture of llama.cpp holds it. {'. '.join(reasons)}."
    )


def family_of(config: Any) -> str:
    """The model_type of a config, or of the model that was compressed."""
    model_type: str = config.model_type
    return model_type.removeprefix(PREFIX)


def check_family(config: Any) -> None:
    """Refuse a family without a GGUF architecture.

    Raises:
        InputError: it is none of those.
    """
    model_type = family_of(config)
    if model_type not in CANDIDATES:
        raise InputError(
            f"model_type {model_type!r} is not written as GGUF; {', '.join(CANDIDATES)} are. A "
            f"result of --tier plain is for llama.cpp's own converter, if that knows the family."
        )


def config_obstacle(config: Any) -> str | None:
    """Why no file can represent a model of this config, whatever its sizes, or None.

    :func:`check_family` handles families that are not supported at all.
    """
    candidates = CANDIDATES.get(family_of(config))
    if candidates is None:
        return None
    if config.hidden_act != "silu":
        return (
            f"its MLPs have the activation {config.hidden_act!r}, and those architectures of "
            f"llama.cpp that its shapes need have silu"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    rope_type = rope.get("rope_type", "default")
    if rope_type not in STEADY:
        return (
            f"rope_type {rope_type!r} is not one of those whose frequencies a GGUF file can have "
            f"at every number of tokens; {', '.join(STEADY)} will do"
        )
    heads = HeadLayout.of(config, rotary=True)
    if heads.rotary != heads.width:
        return STILL
    scaled = rope_type != "default" and rope.get("factor", 1.0) != 1.0
    if scaled and not any(architecture.factors for architecture in candidates):
        names = " and ".join(architecture.name for architecture in candidates)
        return (
            f"rope_type {rope_type!r} has other rotary frequencies than those of its base, for "
            f"which {names}, all that a {family_of(config)} may become here, have no place"
        )
    return None


def by_layer_obstacle(config: Any) -> str | None:
    """Why no file can represent a model of this config with sizes that differ by layer, or None."""
    model_type = family_of(config)
    if model_type not in CANDIDATES:
        return f"model_type {model_type!r} is not written as GGUF ({', '.join(CANDIDATES)} are)"
    held = [a for a in CANDIDATES[model_type] if a.by_layer]
    if all(not a.own_head for a in held) and not config.tie_word_embeddings:
        names = " and ".join(a.name for a in held)
        return (
            f"of a {model_type}, {names} alone has sizes by layer, and takes the embedding for its "
            f"output head, where this model has another"
        )
    return None


def rotary(model: Model) -> tuple[float, Tensor, float]:
    """The scale of a model's rotary tables, its frequencies, and their base."""
    module: Any = model.module.base_model.rotary_emb
    rope = model.config.rope_parameters
    frequencies = module.inv_freq.detach().cpu().double()
    return float(module.attention_scaling), frequencies, float(rope["rope_theta"])


def sliding_window(config: Any) -> int | None:
    """Length of the sliding window, if there is one."""
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    used = kinds is None or "sliding_attention" in kinds
    positions = config.max_position_embeddings
    return window if used and window is not None and window < positions else None


def _pairs(block: Block) -> Tensor:
    """For each KV head, the columns of its rotary pairs, in order."""
    attention = block.attention.module
    if attention.rotary == NARROWED_PAIRS:
        return attention.rope_pairs.cpu()
    return torch.arange(attention.query_key // 2).expand(attention.kv_heads, -1)


def _layer(block: Block, architecture: Architecture) -> Layer:
    attention = block.attention.module
    width = max(1, inputs_by_outputs(block.mlp.consumer).shape[0])
    if attention.value:
        return Layer(attention.heads, attention.kv_heads, width)
    # A first layer without heads leaves no head to take the width from, and a bias needs one.
    stub = not architecture.headless or block.index == 0 or attention.o_proj.bias is not None
    return Layer(1, 1, width) if stub else Layer(0, 0, width)


def _obstacle(layout: Layout, model: Model) -> str | None:
    """Why the architecture can't represent the model, or None; names the units."""
    architecture, blocks = layout.architecture, model.blocks
    if not layout.uniform and not architecture.by_layer:
        return f"{_differing(layout.layers)} differ from layer to layer"
    checks: tuple[tuple[str, Callable[[Block], bool], str], ...] = (
        ("q", lambda b: any(p.bias is not None for p in _inputs(b)), "queries, keys or values"),
        ("o", lambda b: b.attention.module.o_proj.bias is not None, "the attention's output"),
        ("m", _mlp_bias, "the MLP"),
    )
    for letter, has, what in checks:
        found = [block.index for block in blocks if has(block)]
        if found and letter not in architecture.biases:
            return (
                f"it has no bias for {what}, as in {_named(found)} (methods that add one leave it "
                f"out with --compensate 0)"
            )
    if layout.factors is not None and not architecture.factors:
        rope = model.config.rope_parameters["rope_type"]
        cause = f"rope_type {rope!r} has" if rope != "default" else "chosen rotary pairs have"
        return f"its rotary frequencies are those of its base, and {cause} others"
    wide = max(layer.heads for layer in layout.layers) * layout.head
    if architecture.square and wide != model.config.hidden_size:
        return f"its heads together are as wide as the stream, {model.config.hidden_size}"
    if not architecture.own_head and not model.config.tie_word_embeddings:
        return (
            "it takes the embedding for its output head, and this model has another; make all "
            "layers alike (--tier plain), or start from a model with tied embeddings"
        )
    return None


def _differing(layers: Sequence[Layer]) -> str:
    found = []
    for name in ("heads", "kv_heads", "width"):
        sizes = [getattr(layer, name) for layer in layers]
        if len(set(sizes)) > 1:
            what = "MLP widths" if name == "width" else name.replace("_", " ").replace("kv", "KV")
            found.append(f"{what} ({', '.join(map(str, sizes[:6]))}{', …' * (len(sizes) > 6)})")
    return " and ".join(found)


def _inputs(block: Block) -> tuple[Any, Any, Any]:
    attention = block.attention.module
    return attention.q_proj, attention.k_proj, attention.v_proj


def _mlp_bias(block: Block) -> bool:
    made: list[Any] = [*(module for module, _ in block.mlp.producers), block.mlp.consumer]
    return any(module.bias is not None for module in made)


def _named(indices: Sequence[int]) -> str:
    return ", ".join(f"layers.{i}" for i in indices[:4]) + (", …" if len(indices) > 4 else "")


def score_factor(block: Block, layout: Layout) -> float:
    """Factor of the queries, so that llama.cpp's scores equal the model's.

    llama.cpp divides scores by the root of the head width in the file. The model multiplies them by
    its own scale, and queries and keys by the scale of its rotary tables.
    """
    return float(block.attention.module.scaling) * math.sqrt(layout.head) * layout.turned**2
