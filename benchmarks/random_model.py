"""A Llama of random weights as a checkpoint, written shard by shard, and text to calibrate it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from floors import Shape
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig

import secateur

DEMO = Path(secateur.__file__).parent / "data" / "demo-model"


def write_model(folder: Path, shape: Shape, device: str = "cpu") -> None:
    """The checkpoint in bfloat16, a shard a block; no more than one is in memory."""
    folder.mkdir(parents=True)
    LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=max(512, shape.length),
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        bos_token_id=0,
        eos_token_id=1,
    ).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder)
    places, size = {}, 0
    torch.manual_seed(0)
    for number, shard in enumerate(shards(shape, device), 1):
        file = f"model-{number:05d}-of-{shape.blocks + 1:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
        size += sum(tensor.nbytes for tensor in shard.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def shards(shape: Shape, device: str) -> Iterator[dict[str, Tensor]]:
    hidden, mlp = shape.hidden, shape.mlp

    def drawn(outputs: int, inputs: int, scale: float = 1.0) -> Tensor:
        weight = torch.empty(outputs, inputs, dtype=torch.bfloat16, device=device)
        return weight.normal_(std=scale * inputs**-0.5).cpu()

    def ones() -> Tensor:
        return torch.ones(hidden, dtype=torch.bfloat16)

    quiet = (2 * shape.blocks) ** -0.5  # so that the stream grows as in a trained model
    for block in range(shape.blocks):
        tensors = {
            "input_layernorm": ones(),
            "post_attention_layernorm": ones(),
            **{f"self_attn.{name}_proj": drawn(hidden, hidden) for name in "qkv"},
            "self_attn.o_proj": drawn(hidden, hidden, quiet),
            "mlp.gate_proj": drawn(mlp, hidden),
            "mlp.up_proj": drawn(mlp, hidden),
            "mlp.down_proj": drawn(hidden, mlp, quiet),
        }
        yield {f"model.layers.{block}.{name}.weight": t for name, t in tensors.items()}
    yield {
        "model.embed_tokens.weight": drawn(shape.vocabulary, hidden, hidden**0.5),
        "model.norm.weight": ones(),
        "lm_head.weight": drawn(shape.vocabulary, hidden),
    }


def write_text(file: Path, tokens: int) -> None:
    """Random tokens, twice as many as asked for: the end of a text is set aside."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    drawing = torch.Generator().manual_seed(0)
    ids = torch.randint(2, len(tokenizer), (2 * tokens,), generator=drawing)
    file.write_text(tokenizer.decode(ids.tolist()))
