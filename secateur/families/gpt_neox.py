"""GPT-NeoX and Pythia: q, k, v interleaved by head in one linear, partial rotary positions."""

from torch import nn

from secateur.families.base import Anatomy, HeadLayout, Projection, Projections, linear


def project(attention: nn.Module, heads: HeadLayout) -> Projections:
    """Each head's rows in the fused linear are its query, its key, its value."""
    fused = linear(attention.get_submodule("query_key_value"))
    parts = (heads.heads, 3, heads.width)
    weight = fused.weight.view(*parts, -1)
    bias = None if fused.bias is None else fused.bias.view(*parts)
    q, k, v = (
        Projection(weight[:, i].flatten(0, 1), None if bias is None else bias[:, i].flatten())
        for i in range(3)
    )
    return Projections(q, k, v, linear(attention.get_submodule("dense")))


GPT_NEOX = Anatomy(
    family="GPT-NeoX / Pythia",
    model_types=("gpt_neox",),
    blocks="layers",
    attention="attention",
    project=project,
    producers=(("mlp.dense_h_to_4h", 1),),
    activation="mlp.act",
    consumer="mlp.dense_4h_to_h",
    width_key="intermediate_size",
    rotary=True,
)
