"""Blocks that are gone: how the others are numbered, and taking them out of the model."""

from typing import Any

from torch import nn

from secateur.models.block import Block
from secateur.models.model import Model

PER_LAYER = ("layer_types", "no_rope_layers")  #: config keys that list something of every layer


def place(model: Model, block: Block) -> int:
    """The number of a block in its stack in the checkpoint, where those gone don't count."""
    before = (b for b in model.blocks[: block.index] if b.anatomy is block.anatomy)
    return sum(not b.gone for b in before)


def renumber(model: Model, block: Block) -> None:
    """Give what is inside a block its number in the checkpoint: KV caches go by it.

    A stock class may scale scores by that number, too. The queries then make up for the difference.
    """
    number = place(model, block)
    for mixer in block.mixers:
        attention = mixer.module
        ratio = (number + 1) / (int(attention.layer_idx or 0) + 1)
        if getattr(model.config, "scale_attn_by_inverse_layer_idx", False) and ratio != 1:
            queries = (attention.q_proj, block.anatomy.project(mixer.stock, mixer.layout).q)
            # Narrow and stock attention share what nothing changed, which must not shrink twice.
            own = {t.data_ptr(): t for q in queries for t in (q.weight, q.bias) if t is not None}
            for tensor in own.values():
                tensor.data.mul_(ratio)
            attention.scaling = attention.scaling / ratio
    number_layers(block, number)


def number_layers(block: Block, number: int) -> None:
    """Give every module of a block, and of attentions that were replaced, a layer index."""
    for root in (block.module, *(mixer.stock for mixer in block.mixers)):
        for module in root.modules():
            if getattr(module, "layer_idx", None) is not None:
                numbered: Any = module
                numbered.layer_idx = number


def close_ranks(model: Model) -> None:
    """Take what is gone out of the model; config and blocks count only those that are left."""
    anatomy, config, blocks = model.anatomy, model.config, model.blocks
    assert anatomy is not None
    left = [block for block in blocks if not block.gone]
    if len(left) == len(blocks):
        return
    for name in PER_LAYER:
        if (entries := getattr(config, name, None)) is not None:
            setattr(config, name, [entries[block.index] for block in left])
    config.num_hidden_layers = len(left)
    modules = nn.ModuleList(block.module for block in left)
    model.module.base_model.set_submodule(anatomy.blocks, modules)
    for number, block in enumerate(left):
        renumber(model, block)
        block.index = number
    model.blocks = left
