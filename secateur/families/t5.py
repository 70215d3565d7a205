"""T5: an encoder and a decoder, RMS norms ahead, no biases, a relative position bias, gated or not.

Its first blocks make the position bias of their stacks. The decoder's attention to the encoder
stays at full width: its keys and values come from another stream than its queries.
"""

from dataclasses import replace
from typing import Any

from secateur.families.base import Anatomy, Crossing, separate


def refusal(config: Any) -> str | None:
    """Half a T5 has no targets, and without a start nothing says how they begin."""
    if not config.is_encoder_decoder:
        return "this T5 is an encoder or a decoder alone, and only both together are served"
    if getattr(config, "decoder_start_token_id", None) is None:
        return "this T5 has no decoder_start_token_id, so nothing says what its decoder starts from"
    return None


def not_gated(config: Any) -> str | None:
    """The first T5 has a plain MLP."""
    return refusal(config) or ("its MLP is gated, as in T5 v1.1" if config.is_gated_act else None)


def gated(config: Any) -> str | None:
    """T5 v1.1 and later has a gated one."""
    return refusal(config) or (None if config.is_gated_act else "its MLP is not gated")


ENCODER = Anatomy(
    family="T5",
    model_types=("t5",),
    blocks="encoder.block",
    attention="layer.0.SelfAttention",
    project=separate("q", "k", "v", "o"),
    producers=(("layer.1.DenseReluDense.wi", 1),),
    activation="layer.1.DenseReluDense.act",
    consumer="layer.1.DenseReluDense.wo",
    width_key="d_ff",
    rotary=False,
    outputs=3,
    position_bias=True,
    tied="scale_decoder_outputs",  # tie_word_embeddings is made true, and the weights decide
    use="seq2seq",
    refusal=not_gated,
)
DECODER = replace(
    ENCODER,
    blocks="decoder.block",
    producers=(("layer.2.DenseReluDense.wi", 1),),
    activation="layer.2.DenseReluDense.act",
    consumer="layer.2.DenseReluDense.wo",
    crossing=Crossing(
        norm="encoder.final_layer_norm",
        argument="encoder_hidden_states",
        output="layer.1.EncDecAttention.o",
    ),
)
T5 = replace(ENCODER, decoder=DECODER)
T5_GATED = replace(
    T5,
    family="T5 v1.1 / Flan-T5",
    producers=(("layer.1.DenseReluDense.wi_0", 1), ("layer.1.DenseReluDense.wi_1", 1)),
    decoder=replace(
        DECODER,
        producers=(("layer.2.DenseReluDense.wi_0", 1), ("layer.2.DenseReluDense.wi_1", 1)),
    ),
    refusal=gated,
)
