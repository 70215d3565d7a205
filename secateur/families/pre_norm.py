"""Families whose residual stream can turn to another basis; a list, as it must not be inherited."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PreNorm:
    """Where a stream goes by x + attention(norm(x)), then x + mlp(norm(x)), with RMS norms.

    The norms divide by √(mean x² + ε), multiply by a weight and do nothing else; neither embeddings
    nor sums nor logits have a multiplier.

    Attributes:
        attention_norm: the norm before attention, in a block.
        mlp_norm: the one before the MLP, in a block.
        mlp: the MLP, in a block.
        last_norm: the one behind all blocks, in the base model.
    """

    attention_norm: str
    mlp_norm: str
    mlp: str
    last_norm: str


LIKE_LLAMA = PreNorm("input_layernorm", "post_attention_layernorm", "mlp", "norm")
#: by the first model_type of a family, which stands for all of them
PRE_NORMS = dict.fromkeys(("llama", "qwen2", "qwen3", "phi3"), LIKE_LLAMA)
