"""What is coupled to what inside one block of a model family, as data."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn


class Projection(NamedTuple):
    """Weight (outputs, inputs) and bias (outputs) of one linear map, in the stock head layout."""

    weight: Tensor
    bias: Tensor | None


class Projections(NamedTuple):
    """The four maps of an attention; heads are the slow axis of q, k, v outputs and of o inputs."""

    q: Projection
    k: Projection
    v: Projection
    o: Projection


@dataclass(frozen=True)
class HeadLayout:
    """Head layout of one attention: counts, width of a head, and how many of its dims rotate."""

    heads: int
    kv_heads: int
    width: int
    rotary: int

    @classmethod
    def of(cls, config: Any, rotary: bool) -> "HeadLayout":
        """Read the layout from a transformers config."""
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        share = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
        return cls(heads, kv_heads, width, int(width * share) if rotary else 0)


@dataclass(frozen=True)
class Anatomy:
    """A model family: where its blocks are and which weights of a block belong together.

    Paths are relative to a block, ``blocks`` to the base model (the model without its head).

    Attributes:
        family: name shown to people.
        model_types: the ``config.model_type`` values it serves.
        blocks: the module list of blocks.
        attention: the attention module.
        project: takes the attention module and its head layout, gives its four maps.
        producers: linears whose outputs are the MLP's hidden channels, with the number of equal
            parts that each output is made of (2 where gate and up are one matrix). Where there
            are two in all, the MLP is gated, and the first is the gate.
        activation: what turns the producers' output, or the gate, into channels.
        consumer: the linear that reads the hidden channels.
        width_key: the config key of the MLP width.
        rotary: whether positions turn queries and keys.
    """

    family: str
    model_types: tuple[str, ...]
    blocks: str
    attention: str
    project: Callable[[nn.Module, HeadLayout], Projections]
    producers: tuple[tuple[str, int], ...]
    activation: str
    consumer: str
    width_key: str
    rotary: bool


def separate(q: str, k: str, v: str, o: str) -> Callable[[nn.Module, HeadLayout], Projections]:
    """For families that keep the four maps in four linears with these names."""

    def project(attention: nn.Module, _: HeadLayout) -> Projections:
        return Projections(*(linear(attention.get_submodule(name)) for name in (q, k, v, o)))

    return project


def linear(module: nn.Module) -> Projection:
    """Weight and bias of an ``nn.Linear``."""
    assert isinstance(module, nn.Linear)
    return Projection(module.weight, module.bias)


def split(fused: Projection, *sizes: int) -> tuple[Projection, ...]:
    """Cut the outputs of a fused map into consecutive parts."""
    weights = fused.weight.split(sizes)
    biases = [None] * len(sizes) if fused.bias is None else fused.bias.split(sizes)
    return tuple(Projection(w, b) for w, b in zip(weights, biases, strict=True))
