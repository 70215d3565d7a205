"""Encoders: BERT reads text, ViT reads patches of images."""

from typing import Any

from secateur.families.base import Anatomy, separate

# BERT: LayerNorm behind every sum, biases everywhere, tokens that see both sides.


def bert_refusal(config: Any) -> str | None:
    """A BERT that reads another stack, or writes, has other blocks."""
    if config.is_decoder or config.add_cross_attention:
        return "this BERT is a decoder, whose blocks are not those of the encoder"
    return None


BERT = Anatomy(
    family="BERT",
    model_types=("bert",),
    blocks="encoder.layer",
    attention="attention",
    project=separate("self.query", "self.key", "self.value", "output.dense"),
    producers=(("intermediate.dense", 1),),
    activation="intermediate.intermediate_act_fn",
    consumer="output.dense",
    width_key="intermediate_size",
    rotary=False,
    norms_behind=True,
    use="masked",
    refusal=bert_refusal,
)


# ViT: an encoder of image patches, LayerNorm ahead of attention and MLP, biases everywhere.

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
