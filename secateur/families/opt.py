"""OPT: biases everywhere, LayerNorm, ReLU MLP, learned positions."""

from secateur.families.base import Anatomy, separate

OPT = Anatomy(
    family="OPT",
    model_types=("opt",),
    blocks="decoder.layers",
    attention="self_attn",
    project=separate("q_proj", "k_proj", "v_proj", "out_proj"),
    producers=(("fc1", 1),),
    activation="activation_fn",
    consumer="fc2",
    width_key="ffn_dim",
    rotary=False,
    norms_first="do_layer_norm_before",
)
