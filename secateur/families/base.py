"""What is coupled to what inside one block of a model family, as data."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from secateur.families.pre_norm import PRE_NORMS, PreNorm


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
    """Head layout of one attention.

    Attributes:
        heads: query heads.
        kv_heads: key/value heads.
        width: of a head.
        rotary: how many of its dims rotate; they stand first.
        interleaved: whether neighbours are a rotary pair, and not the members of two halves.
        doubled: whether the rotary tables hold every number twice in a row, and not in two halves.
    """

    heads: int
    kv_heads: int
    width: int
    rotary: int
    interleaved: bool = False
    doubled: bool = False

    @classmethod
    def of(cls, config: Any, rotary: bool) -> "HeadLayout":
        """Read the layout from a transformers config."""
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        share = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
        return cls(heads, kv_heads, width, int(width * share) if rotary else 0)

    @property
    def pairs(self) -> list[int]:
        """Dims of a head, the first members of all pairs before the second ones.

        Dims at rest are paired like halves.
        """
        turning, still = [*range(self.rotary)], [*range(self.rotary, self.width)]
        half, rest = self.rotary // 2, len(still) // 2
        first, second = turning[:half], turning[half:]
        if self.interleaved:
            first, second = turning[::2], turning[1::2]
        return [*first, *still[:rest], *second, *still[rest:]]


def as_in_config(heads: HeadLayout, config: Any, block: int) -> HeadLayout:
    """The common keys of the config say it all, and for all blocks."""
    return heads


def served(config: Any) -> str | None:
    """Every config of the family is served."""
    return None


@dataclass(frozen=True)
class Crossing:
    """How the blocks of a decoder read the encoder before it.

    Attributes:
        norm: what takes the encoder's states behind its blocks, in the base model.
        argument: of a block, that gets them then.
        output: the linear that adds what was read to the stream, between attention and MLP.
    """

    norm: str
    argument: str
    output: str


class FeedForward(NamedTuple):
    """The linears of one MLP, see :class:`Anatomy`."""

    producers: tuple[tuple[str, int], ...]
    activation: str
    consumer: str


@dataclass(frozen=True)
class Anatomy:
    """A model family: where its blocks are and which weights of a block belong together.

    Paths are relative to a block, ``blocks`` to the base model (the model without its head). Where
    an encoder and a decoder make a model, it is the encoder's, and ``decoder`` has that of the
    other stack.

    Attributes:
        family: name shown to people.
        model_types: the ``config.model_type`` values it serves.
        blocks: the module list of blocks.
        attention: the attention module; None where blocks have none.
        project: takes the attention module and its head layout, gives its four maps.
        producers: linears whose outputs are the MLP's hidden channels, with the number of equal
            parts that each output is made of (2 where gate and up are one matrix). Where there
            are two in all, the MLP is gated, and the first is the gate.
        activation: what turns the producers' output, or the gate, into channels.
        consumer: the linear that reads the hidden channels.
        width_key: the config key of the MLP width.
        rotary: whether positions turn queries and keys.
        norms_first: attribute of a block that is false where its norms stand behind its sums; None
            where they never do.
        norms_behind: whether attention and MLP each have a norm behind them, before the sum or
            behind it.
        layout: corrects the head layout for a config and a block.
        soft_cap: config key of the bound on attention scores, or None.
        head_norms: how queries and keys are normalised, where they are: "shared" takes every head
            by one norm, "own" by a weight with a row a head, "list" by a list of norms with the
            heads on axis 1, "joint" takes all heads as one vector.
        outputs: how many things a block gives, in a tuple where they are more than one.
        position_bias: whether the first block of a stack makes a bias for the scores of all heads,
            which it gives, and which the others take.
        crossing: how its blocks read the stack before it, or None.
        decoder: the anatomy of the stack behind, or None.
        tied: config key that is false where the head has weights of its own.
        use: what models of it are for; see :mod:`secateur.data.tasks`.
        refusal: takes a config, says why it is not served, or None.
        further_mlps: the MLPs of a block behind its first.
    """

    family: str
    model_types: tuple[str, ...]
    blocks: str
    attention: str | None
    project: Callable[[nn.Module, HeadLayout], Projections]
    producers: tuple[tuple[str, int], ...]
    activation: str
    consumer: str
    width_key: str
    rotary: bool
    norms_first: str | None = None
    norms_behind: bool = False
    layout: Callable[[HeadLayout, Any, int], HeadLayout] = as_in_config
    soft_cap: str | None = None
    head_norms: str = "shared"
    outputs: int = 1
    position_bias: bool = False
    crossing: Crossing | None = None
    decoder: "Anatomy | None" = None
    tied: str = "tie_word_embeddings"
    use: Literal["causal", "masked", "images", "seq2seq"] = "causal"
    refusal: Callable[[Any], str | None] = served
    further_mlps: tuple[FeedForward, ...] = ()

    @property
    def feed_forwards(self) -> tuple[FeedForward, ...]:
        """All MLPs of a block."""
        return (FeedForward(self.producers, self.activation, self.consumer), *self.further_mlps)

    @property
    def pre_norm(self) -> PreNorm | None:
        """The norms that read the residual stream, where it can turn to another basis."""
        return PRE_NORMS.get(self.model_types[0])

    @property
    def stacks(self) -> "tuple[Anatomy, ...]":
        """This one and, where there is one, the decoder."""
        return (self,) if self.decoder is None else (self, self.decoder)

    def heads(self, config: Any, block: int) -> HeadLayout:
        """The head layout of a block of this stack."""
        return self.layout(HeadLayout.of(config, self.rotary), config, block)


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
