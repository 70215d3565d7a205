"""A residual stream with fewer coordinates: in which basis, place by place, and the new weights."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from secateur.apply.surgery import check_finite
from secateur.calibration.collect import check_finite as check_sums
from secateur.calibration.layer_stream import Stream
from secateur.calibration.needs import BlockStatistics, Need, Needs
from secateur.calibration.statistics import Gram, wide
from secateur.data.tokens import Tokens
from secateur.layers.modeling_secateur import SlicedBlock, shorten, sliced
from secateur.methods.base import Method
from secateur.models.block import Block
from secateur.models.linear_ops import inputs_by_outputs, set_linear
from secateur.models.model import Model
from secateur.structure.error_curve import Curve
from secateur.structure.units import Unit
from secateur.utils.precision import exact


def place_curves(
    method: Method, unit: Unit, block: Block, statistics: BlockStatistics
) -> list[Curve]:
    """The predicted error of the stream at every place in a block."""
    needs = sorted(method.needs & statistics.keys(), key=lambda need: need.site.side)
    return [method.solve(unit, block, {need: statistics[need]}).curve for need in needs]


def sliced_blocks(
    model: Model, method: Method, unit: Unit, size: int, tokens: Tokens
) -> Iterator[Block]:
    """Slice the stream of a model block by block; each is given out when it is done.

    The embedding is sliced before the first block, norm and head after the last.
    """
    line = Slicing(model, method, unit, size, tokens)
    before = line.cut(model.blocks[0], Needs.BEHIND_GRAM)
    slice_embedding(model, before)
    for block in model.blocks:
        module = sliced(block.module, places(block))
        line.through_attention(block, module)
        between = line.cut(block, Needs.BETWEEN_GRAM)
        line.through_mlp(module)
        behind = line.cut(block, Needs.BEHIND_GRAM)
        slice_block(block, module, before, between, behind)
        check_finite(block)
        before = behind
        yield block
    slice_head(model, before)


class Slicing:
    """The stream of a sliced model, before the place that is next.

    A sliced model is the dense one whose stream is projected, x ← x E Eᵀ, behind the embedding,
    every attention and every MLP. So the states stay in the dense model's coordinates, and dense
    weights take them from one place to the next.
    """

    def __init__(self, model: Model, method: Method, unit: Unit, size: int, tokens: Tokens) -> None:
        self.method, self.unit, self.size = method, unit, size
        with torch.no_grad():
            self.stream = Stream(model, tokens)

    @torch.no_grad()
    def cut(self, block: Block, need: Need) -> Tensor:
        """The basis E (hidden, size) of this place, where the states are then projected."""
        stream, gram = self.stream, Gram()
        for batch in stream.batches:
            gram.update(stream.at(batch), mask=stream.mask(batch, block))
        check_sums({need: gram})
        basis = self.method.solve(self.unit, block, {need: gram}).at(self.size).encode
        assert basis is not None
        for batch in stream.batches:
            states = wide(stream.at(batch))
            turn = basis.to(states)
            stream.put(batch, states @ turn @ turn.mT)
        return basis

    @torch.no_grad()
    def through_attention(self, block: Block, module: SlicedBlock) -> None:
        """Go on to behind an attention."""
        stream = self.stream
        for batch in stream.batches:
            stream.put(batch, stream.through(block, stream.at(batch), module.behind_attention))

    @torch.no_grad()
    def through_mlp(self, module: SlicedBlock) -> None:
        """Go on to behind an MLP."""
        for batch in self.stream.batches:
            self.stream.put(batch, module.behind_mlp(self.stream.at(batch)))


def places(block: Block) -> dict[str, str]:
    """The modules of a block between which the stream turns."""
    found = block.anatomy.pre_norm
    assert found is not None
    return {
        "attention_norm": found.attention_norm,
        "attention": block.attention.path,
        "mlp_norm": found.mlp_norm,
        "mlp": found.mlp,
    }


def residual_layout(model: Model) -> dict[str, Any] | None:
    """The entry of a sliced stream in the config, or None."""
    found, block = model.anatomy and model.anatomy.pre_norm, model.blocks[0]
    if not found or not isinstance(block.module, SlicedBlock):
        return None
    size = block.attention.module.shape["hidden"]
    return {"size": size, "last_norm": found.last_norm, "places": places(block)}


def slice_block(
    block: Block, module: SlicedBlock, before: Tensor, between: Tensor, behind: Tensor
) -> None:
    """Give a block the coordinates x E of its stream, in place; E is of the place in question."""
    attention, found = block.attention.module, block.anatomy.pre_norm
    assert found is not None
    maps = (attention.q_proj, attention.k_proj, attention.v_proj)
    _read_from(before, module.get_submodule(found.attention_norm), maps)
    _write_into(between, attention.o_proj)
    _read_from(between, module.get_submodule(found.mlp_norm), (m for m, _ in block.mlp.producers))
    _write_into(behind, block.mlp.consumer)
    attention.shape["hidden"] = before.shape[1]
    like = attention.o_proj.weight
    module.attention_shortcut = _parameter(before.mT @ between, like)
    module.mlp_shortcut = _parameter(between.mT @ behind, like)


def slice_embedding(model: Model, basis: Tensor) -> None:
    """Let the embedding give x E; a head that was tied to it keeps the dense weight."""
    embedding: Any = model.module.get_input_embeddings()
    weight = embedding.weight
    embedding.weight = _parameter(exact(weight) @ basis, weight)
    embedding.embedding_dim = basis.shape[1]
    model.config.tie_word_embeddings = False


def slice_head(model: Model, basis: Tensor) -> None:
    """Let the last norm and the head read x E."""
    assert model.anatomy is not None
    assert model.anatomy.pre_norm is not None
    norm = model.module.base_model.get_submodule(model.anatomy.pre_norm.last_norm)
    head: Any = model.module.get_output_embeddings()
    _read_from(basis, norm, (head,))


def _read_from(basis: Tensor, norm: Any, linears: Iterable[nn.Module]) -> None:
    """Let a norm and what reads it read x E; the norm's weight moves into the linears."""
    hidden, size = basis.shape
    scale = exact(norm.weight) * (hidden / size) ** 0.5  # see `shorten`
    turn = scale.unsqueeze(1) * basis
    for linear in linears:
        weight = inputs_by_outputs(linear).t()
        bias = linear.bias if isinstance(linear.bias, Tensor) else None
        set_linear(linear, (exact(weight) @ turn).to(weight), bias)
    shorten(norm, size)


def _write_into(basis: Tensor, linear: nn.Module) -> None:
    """Let a linear add its output times E to the stream."""
    weight = inputs_by_outputs(linear).t()
    bias = linear.bias
    turned = (exact(bias) @ basis).to(bias) if isinstance(bias, Tensor) else None
    set_linear(linear, (basis.mT @ exact(weight)).to(weight), turned)


def _parameter(values: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(values.to(like), requires_grad=False)
