"""GPT-2: Conv1D layers (weights stored inputs × outputs), fused c_attn, learned positions."""

from torch import Tensor, nn

from secateur.families.base import Anatomy, HeadLayout, Projection, Projections, split


def project(attention: nn.Module, heads: HeadLayout) -> Projections:
    """The fused Conv1D holds all queries, then all keys, then all values."""
    width = heads.heads * heads.width
    q, k, v = split(conv1d(attention.get_submodule("c_attn")), width, width, width)
    return Projections(q, k, v, conv1d(attention.get_submodule("c_proj")))


def conv1d(module: nn.Module) -> Projection:
    """Weight and bias of a Conv1D, as a linear has them."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    assert isinstance(bias, Tensor)
    return Projection(weight.t(), bias)


GPT2 = Anatomy(
    family="GPT-2",
    model_types=("gpt2",),
    blocks="h",
    attention="attn",
    project=project,
    producers=(("mlp.c_fc", 1),),
    activation="mlp.act",
    consumer="mlp.c_proj",
    width_key="n_inner",
    rotary=False,
)
