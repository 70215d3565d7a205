"""ViT: an encoder of image patches, LayerNorm ahead of attention and MLP, biases everywhere."""

from secateur.families.base import Anatomy, separate

VIT = Anatomy(
    family="ViT",
    model_types=("vit",),
    blocks="layers",
    attention="attention",
    project=separate("q_proj", "k_proj", "v_proj", "o_proj"),
    producers=(("mlp.fc1", 1),),
    activation="mlp.activation_fn",
    consumer="mlp.fc2",
    width_key="intermediate_size",
    rotary=False,
    use="images",
)
