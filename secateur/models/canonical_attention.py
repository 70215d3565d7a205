"""A family's attention as the one kind that statistics and narrowing meet."""

import copy

import torch
from torch import Tensor, nn

from secateur.families import Anatomy, HeadLayout, Projection
from secateur.layers.attention_secateur import NarrowAttention, narrow_attention
from secateur.models.linear_ops import set_linear


def canonical_attention(stock: nn.Module, anatomy: Anatomy, heads: HeadLayout) -> NarrowAttention:
    """A full-width NarrowAttention with the weights of ``stock``, in its own layout of pairs."""
    maps = anatomy.project(stock, heads)
    shape = {
        "heads": heads.heads,
        "kv_heads": heads.kv_heads,
        "query_key": heads.width,
        "value": heads.width,
        "bias": "".join(n for n, p in zip("qkvo", maps, strict=True) if p.bias is not None),
        "rotary": "all" if heads.rotary else "none",
    }
    if heads.rotary and heads.doubled:
        shape["doubled"] = True
    if anatomy.soft_cap is not None:
        cap = getattr(stock.config, anatomy.soft_cap)
        shape |= {} if cap is None else {"soft_cap": cap}
    if anatomy.head_norms != "shared":
        shape["head_norms"] = anatomy.head_norms
    with torch.device("meta"):
        attention = narrow_attention(stock, shape).train(stock.training)
    q, k, v, o = maps
    order = torch.tensor(heads.pairs, device=q.weight.device)
    if heads.pairs != sorted(heads.pairs):
        q, k = (_reordered(p, order) for p in (q, k))
        for name, norm in (("q_norm", attention.q_norm), ("k_norm", attention.k_norm)):
            if norm is not None:
                setattr(attention, name, _reordered_norm(norm, order))
    for module, part in zip(
        (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
        (q, k, v, o),
        strict=True,
    ):
        set_linear(module, part.weight, part.bias)
    return attention


def _reordered(part: Projection, order: Tensor) -> Projection:
    """The same map with the dims of every head in another order."""
    heads = (-1, len(order))
    weight = part.weight.unflatten(0, heads)[:, order].flatten(0, 1)
    if part.bias is None:
        return Projection(weight, None)
    return Projection(weight, part.bias.view(heads)[:, order].flatten())


def _reordered_norm(norm: nn.Module, order: Tensor) -> nn.Module:
    """A copy of a norm inside heads, for dims in another order."""
    made = copy.deepcopy(norm)
    for parameter in made.parameters():
        heads = parameter.data.unflatten(-1, (-1, len(order)))
        parameter.data = heads[..., order].flatten(-2)
    return made
