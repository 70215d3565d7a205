"""Checkpoints of hand-made shapes, without calibration."""

import torch

from secateur.apply.save import finish, store_block, writer_for
from secateur.apply.surgery import narrow_unit
from secateur.structure.narrowing import Narrowing


def picked(size, count, seed):
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count]


def narrowing_of(block, unit, size, pairs=None):
    """Some channels, heads or pairs, and random maps of values."""
    kv_heads = block.attention.module.kv_heads
    if unit.kind in ("mlp", "heads"):
        return Narrowing(keep=picked(unit.size, size, block.index).sort().values)
    if unit.kind == "query_key":
        if pairs is None:
            pairs = [picked(unit.size // 2, size // 2, block.index).tolist()] * kv_heads
        first = torch.tensor(pairs, dtype=torch.int64).view(kv_heads, size // 2)
        return Narrowing(keep=torch.cat((first, first + unit.size // 2), 1))
    generator = torch.Generator().manual_seed(block.index)
    encode = torch.randn(kv_heads, unit.size, size, generator=generator).double() / unit.size**0.5
    spread = encode.repeat_interleave(block.attention.module.num_key_value_groups, 0).mT
    return Narrowing(encode=encode, consumer=(spread @ block.attention.output_rows).flatten(0, 1))


def shaped(model, folder, sizes, pairs=None, reshape=None):
    """Write a model with units of these sizes, for all layers by kind or for some by name.

    ``pairs`` are those kept: (KV heads, pairs), or a list of such for the layers. ``reshape`` is
    called with every block then.
    """
    for block in model.blocks:
        kinds = {name.partition(".")[0]: size for name, size in sizes.items() if "." not in name}
        for unit in block.units(1, (*("mlp", "query_key", "value_output", "heads"),)):
            size = sizes.get(unit.name, kinds.get(unit.kind, unit.size))
            if size == unit.size:
                continue
            own = pairs[block.index] if pairs and isinstance(pairs[0][0], list) else pairs
            narrow_unit(block, unit, narrowing_of(block, unit, size, own))
        if reshape is not None:
            reshape(block)
    writer = writer_for(model, "per-layer", folder)
    for block in model.blocks:
        store_block(model, block, writer)
    finish(model, "per-layer", writer)
    return folder
