"""Tiny random models of every served family, saved as checkpoints that ordinary code opens.

Their weights are small but not trivial: biases and norms are random, and the rows of projections
have unequal scales, so that rankings, folded biases and norms all matter.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, ViTImageProcessorPil
from transformers.pytorch_utils import Conv1D

from secateur.data.tokens import UNLABELLED, Tokens, sample

VOCAB, WORDS = 99, 88
MASK = WORDS + 3  # the token that hides another
HIDDEN, WIDTH, BLOCKS, HEADS, POSITIONS = 32, 56, 3, 4, 64

Options = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """One variant of a model family.

    Attributes:
        config: name of its config class.
        options: what differs from the common sizes.
        fused: layout of a fused query/key/value map: "blocks" (all q, all k, all v), "heads" (per
            KV head its q, k, v) or "" where the three are apart.
        names: attention modules inside a block: those of q, k, v (one where fused) and o.
        decoder: of a second stack, the path of its blocks and of the consumer in each.
    """

    config: str
    options: Options = field(default_factory=dict)
    attention: str = "self_attn"
    fused: str = ""
    names: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    consumer: str = "mlp.down_proj"
    blocks: str = "layers"
    use: str = "causal"
    decoder: tuple[str, str] | None = None

    def stacked(self, block: int) -> bool:
        """Whether a block is one of the second stack."""
        return self.decoder is not None and block >= self.options["num_layers"]

    def path(self, block: int) -> str:
        """Where a block is in the base model."""
        if self.decoder is None or not self.stacked(block):
            return f"{self.blocks}.{block}"
        return f"{self.decoder[0]}.{block - self.options['num_layers']}"

    def consumer_path(self, block: int) -> str:
        """Where the consumer of a block is in the base model."""
        inside = self.consumer if self.decoder is None else self.decoder[1]
        return f"{self.path(block)}.{inside if self.stacked(block) else self.consumer}"

    @property
    def auto(self) -> Any:
        """What opens it in transformers."""
        return getattr(transformers, AUTO[self.use])


AUTO = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "images": "AutoModelForImageClassification",
    "seq2seq": "AutoModelForSeq2SeqLM",
}

_LLAMA: Options = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_OPT: Options = {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"} | {
    "ffn_dim": WIDTH,
    "word_embed_proj_dim": HIDDEN,
}
del _OPT["intermediate_size"]
_NEOX: Options = {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"} | {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
    },
}
_GPT2: Options = {
    "vocab_size": VOCAB,
    "n_embd": HIDDEN,
    "n_layer": BLOCKS,
    "n_head": HEADS,
    "n_positions": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA: Options = _LLAMA | {
    "head_dim": 8,
    "query_pre_attn_scalar": 20,
    "sliding_window": 12,
    "final_logit_softcapping": 5.0,
    "attn_logit_softcapping": 2.0,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_FALCON: Options = {
    k: v for k, v in _LLAMA.items() if k not in ("num_key_value_heads", "intermediate_size")
} | {"ffn_hidden_size": WIDTH}
_LLAMA3_ROPE: Options = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN_ROPE: Options = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}


def _phi3(**more: Any) -> Family:
    return Family("Phi3Config", _LLAMA | more, fused="blocks", names=("qkv_proj", "o_proj"))


def _opt(**more: Any) -> Family:
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    return Family("OPTConfig", _OPT | more, names=names, consumer="fc2", blocks="decoder.layers")


def _gpt2(**more: Any) -> Family:
    return Family(
        "GPT2Config",
        _GPT2 | more,
        attention="attn",
        fused="blocks",
        names=("c_attn", "c_proj"),
        consumer="mlp.c_proj",
        blocks="h",
    )


def _falcon(**more: Any) -> Family:
    return Family(
        "FalconConfig",
        _FALCON | more,
        attention="self_attention",
        fused="heads",
        names=("query_key_value", "dense"),
        consumer="mlp.dense_4h_to_h",
        blocks="h",
    )


def _neox(**more: Any) -> Family:
    return Family(
        "GPTNeoXConfig",
        _NEOX | more,
        attention="attention",
        fused="heads",
        names=("query_key_value", "dense"),
        consumer="mlp.dense_4h_to_h",
    )


def _t5(**more: Any) -> Family:
    return Family(
        "T5Config",
        {
            "vocab_size": VOCAB,
            "d_model": HIDDEN,
            "d_kv": HIDDEN // HEADS,
            "d_ff": WIDTH,
            "num_layers": 2,
            "num_decoder_layers": 1,  # stock classes can't generate where they are more
            "num_heads": HEADS,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 12,
            "decoder_start_token_id": 0,
            "eos_token_id": 2,
        }
        | more,
        attention="layer.0.SelfAttention",
        names=("q", "k", "v", "o"),
        consumer="layer.1.DenseReluDense.wo",
        blocks="encoder.block",
        use="seq2seq",
        decoder=("decoder.block", "layer.2.DenseReluDense.wo"),
    )


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaConfig", _LLAMA),
    "llama_biased_tied": Family(
        "LlamaConfig",
        _LLAMA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama_scaled_rope": Family("LlamaConfig", _LLAMA | {"rope_parameters": _LLAMA3_ROPE}),
    "llama_yarn": Family("LlamaConfig", _LLAMA | {"rope_parameters": _YARN_ROPE}),
    "llama_wide_heads": Family("LlamaConfig", _LLAMA | {"head_dim": 12}),
    "mistral": Family("MistralConfig", _LLAMA | {"sliding_window": 12}),
    "qwen2": Family("Qwen2Config", _LLAMA | {"tie_word_embeddings": True}),
    "qwen3": Family("Qwen3Config", _LLAMA | {"head_dim": 8}),
    "phi3": _phi3(),
    "phi3_partial": _phi3(
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        }
    ),
    "gemma": Family("GemmaConfig", _LLAMA | {"head_dim": 12, "tie_word_embeddings": True}),
    "gemma2": Family("Gemma2Config", _GEMMA),
    "gemma3": Family("Gemma3TextConfig", _GEMMA),  # caps no scores, whatever its config says
    "stablelm": Family(
        "StableLmConfig",
        _LLAMA
        | {
            "use_qkv_bias": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "cohere": Family("CohereConfig", _LLAMA | {"logit_scale": 0.25, "attention_bias": True}),
    "cohere2": Family(
        "Cohere2Config",
        _LLAMA | {k: _GEMMA[k] for k in ("sliding_window", "layer_types")} | {"logit_scale": 0.25},
    ),
    "olmo2": Family("Olmo2Config", _LLAMA),
    "glm": Family("GlmConfig", _LLAMA | {"head_dim": 8, "attention_bias": True}),
    "starcoder2": Family(
        "Starcoder2Config", _LLAMA | {"sliding_window": 12}, consumer="mlp.c_proj"
    ),
    "falcon": _falcon(num_kv_heads=2, new_decoder_architecture=True, bias=True),
    "falcon_multi_query": _falcon(parallel_attn=False, tie_word_embeddings=True),
    "opt": _opt(tie_word_embeddings=True),
    "opt_norm_after": _opt(
        do_layer_norm_before=False, word_embed_proj_dim=16, tie_word_embeddings=True
    ),
    "opt_no_bias": _opt(enable_bias=False, layer_norm_elementwise_affine=False),
    "gpt2": _gpt2(),
    "gpt2_scaled": _gpt2(scale_attn_by_inverse_layer_idx=True, n_inner=WIDTH),
    "gpt_neox": _neox(),
    "gpt_neox_sequential": _neox(use_parallel_residual=False, attention_bias=False),
    "bert": Family(
        "BertConfig",
        {
            k: v
            for k, v in _LLAMA.items()
            if k not in ("num_key_value_heads", "tie_word_embeddings")
        },
        attention="attention",
        names=("self.query", "self.key", "self.value", "output.dense"),
        consumer="output.dense",
        blocks="encoder.layer",
        use="masked",
    ),
    "vit": Family(
        "ViTConfig",
        {
            "hidden_size": HIDDEN,
            "intermediate_size": WIDTH,
            "num_hidden_layers": BLOCKS,
            "num_attention_heads": HEADS,
            "image_size": 16,
            "patch_size": 4,
            "num_labels": 10,
        },
        attention="attention",
        consumer="mlp.fc2",
        use="images",
    ),
    "t5": _t5(),
    "t5_gated": _t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
}
CAUSAL = [name for name, family in FAMILIES.items() if family.use == "causal"]
WRITING = [name for name, family in FAMILIES.items() if family.use in ("causal", "seq2seq")]
WHOLE = {"t5", "t5_gated"}  # heads and blocks cannot go
NORMED = {"qwen3", "gemma3", "olmo2"}  # queries and keys cannot be narrowed
PARTIAL = {"phi3_partial", "gpt_neox", "gpt_neox_sequential", "stablelm", "glm"}
ROTARY = {name for name in FAMILIES if not name.startswith(("opt", "gpt2", "bert", "vit", "t5"))}


def attentions(name: str) -> tuple[str, ...]:
    """The implementations of attention that the family has; soft-capped scores have but one."""
    return ("eager",) if name == "gemma2" else ("eager", "sdpa")


def window(name: str, block: int) -> int | None:
    """How far back the queries of a block see, or None."""
    options = FAMILIES[name].options
    kinds = options.get("layer_types", ["sliding_attention"] * BLOCKS)
    return options.get("sliding_window") if kinds[block] == "sliding_attention" else None


def caches(name: str, block: int) -> bool:
    """Whether a block keeps keys and values while a model writes."""
    return FAMILIES[name].use == "causal" or FAMILIES[name].stacked(block)


def seen_by(name: str, block: int, tokens: Tokens) -> int:
    """How many positions of a row a block sees."""
    if FAMILIES[name].decoder is None:
        return tokens.length
    read = tokens.ids.shape[1]
    return tokens.length - read if FAMILIES[name].stacked(block) else read


def interleaved(name: str, block: int) -> bool:
    """Whether rotary pairs are neighbours; Cohere 2 turns only where there is a window."""
    return name in ("cohere", "glm") or (name == "cohere2" and window(name, block) is not None)


def random_model(name: str, seed: int = 0) -> Any:
    """A stock transformers model of the variant, with random weights."""
    family = FAMILIES[name]
    torch.manual_seed(seed)
    config = getattr(transformers, family.config)(**family.options)
    model = family.auto.from_config(config).eval().requires_grad_(False)
    for module in model.modules():
        _randomise(module)
    model.tie_weights()
    if name == "vit":
        model.vit.embeddings.position_embeddings.normal_(0, 0.5)
        return model
    head = model.get_output_embeddings().weight
    if head is not model.get_input_embeddings().weight:
        head.mul_(2.0)
    if name == "t5_gated":  # its head is its own, as the sizes of two weights say
        model.lm_head.weight = nn.Parameter(torch.randn(VOCAB, HIDDEN), requires_grad=False)
    if name in WRITING:
        model.generation_config.eos_token_id = None  # continuations have one length
    return model


def _randomise(module: nn.Module) -> None:
    if isinstance(module, nn.Embedding):
        module.weight.copy_(0.5 * torch.randn_like(module.weight))
        return
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if isinstance(module, (nn.Linear, Conv1D)):
        inputs = weight.shape[0] if isinstance(module, Conv1D) else weight.shape[1]
        fresh = torch.randn(weight.numel() // inputs, inputs) / inputs**0.5
        fresh *= 0.2 + 1.8 * torch.rand(len(fresh), 1)
        weight.copy_(fresh.t() if isinstance(module, Conv1D) else fresh)
    elif isinstance(weight, nn.Parameter):
        weight.copy_(1 + 0.3 * torch.randn_like(weight))
    if isinstance(bias, nn.Parameter):
        bias.copy_(0.3 * torch.randn_like(bias))


def tokenizer(sentinels: int = 0) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: four specials, w0 … w87, and perhaps sentinels for hidden spans.

    Some ids stay free, as transformers adds specials of its own to a few families' tokenizers.
    """
    hiding = [f"<extra_id_{i}>" for i in range(sentinels)]
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(WORDS)), "<mask>", *hiding]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        mask_token="<mask>",
        additional_special_tokens=hiding,
    )


def stream(length: int, seed: int = 0) -> Tensor:
    """Token ids with some structure: a random walk through the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(-4, 6, (length,), generator=generator)
    jumps = (torch.rand(length, generator=generator) < 0.3) * torch.randint(
        0, WORDS, (length,), generator=generator
    )
    return 3 + (steps + jumps).cumsum(0) % WORDS


def words(length: int, seed: int = 0) -> str:
    """The same as text that :func:`tokenizer` reads back."""
    return " ".join(f"w{i - 3}" for i in stream(length, seed).tolist())


def read(name: str, rows: int, length: int, seed: int = 0) -> Tokens:
    """What a variant reads: windows of :func:`stream`, for a masked model with hidden tokens, for
    one that reads and writes in two parts; or
    random images, one for every fourth token, as it has one output."""
    generator = torch.Generator().manual_seed(seed)
    if FAMILIES[name].use == "images":
        side, classes = (FAMILIES[name].options[key] for key in ("image_size", "num_labels"))
        rows = max(1, rows * length // 4)
        images = torch.randn(rows, 3, side, side, generator=generator)
        patches = (side // FAMILIES[name].options["patch_size"]) ** 2
        labels = torch.randint(classes, (rows,), generator=generator)
        return Tokens(images, torch.ones(rows, patches + 1, dtype=torch.bool), labels)
    windows = sample(stream(rows * length, seed), rows, length, 0)
    if FAMILIES[name].use == "causal":
        return windows
    if FAMILIES[name].use == "seq2seq":  # the last quarter is to be written
        ends = -(length // 4)
        return Tokens(windows.ids[:, :ends], windows.mask, windows.ids[:, ends:])
    hidden = torch.rand(windows.ids.shape, generator=generator) < 0.4
    labels = torch.where(hidden, windows.ids, UNLABELLED)
    return Tokens(torch.where(hidden, MASK, windows.ids), windows.mask, labels)


def save(model: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a stock checkpoint with its tokenizer or image processor."""
    model.to(dtype).save_pretrained(folder)
    if model.config.model_type == "vit":
        side = model.config.image_size
        ViTImageProcessorPil(size={"height": side, "width": side}).save_pretrained(folder)
    else:
        tokenizer(5 if model.config.model_type == "t5" else 0).save_pretrained(folder)
    return folder
