"""A Llama of random weights as a folder that transformers opens, and text to calibrate it."""

import shutil
from pathlib import Path

import torch
from floors import Shape
from transformers import AutoTokenizer, LlamaConfig

from secateur.data import bundled
from secateur.io.safetensors_writer import Writer


def write_model(folder: Path, shape: Shape, device: str = "cpu") -> int:
    """The checkpoint in bfloat16; no more than a tensor is in memory. Says how many parameters."""
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"],
    )
    generator = torch.Generator(device).manual_seed(0)
    writer, hidden, mlp = Writer(folder), shape.hidden, shape.mlp
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (shape.keys, hidden),
        "self_attn.v_proj": (shape.keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }
    count = 0

    def add(name: str, *sizes: int) -> None:
        nonlocal count
        tensor = torch.empty(sizes, dtype=torch.bfloat16, device=device)
        if len(sizes) == 2:
            tensor.normal_(std=sizes[1] ** -0.5, generator=generator)
        else:
            tensor.fill_(1)
        count += tensor.numel()
        writer.add(f"{name}.weight", tensor.cpu())

    add("model.embed_tokens", shape.vocabulary, hidden)
    for block in range(shape.blocks):
        for name, sizes in shapes.items():
            add(f"model.layers.{block}.{name}", *sizes)
        for name in ("input_layernorm", "post_attention_layernorm"):
            add(f"model.layers.{block}.{name}", hidden)
    add("model.norm", hidden)
    add("lm_head", shape.vocabulary, hidden)
    writer.finish()
    writer.settle()
    config.save_pretrained(folder)
    for file in bundled.model_path().glob("tokenizer*"):
        shutil.copy(file, folder)
    return count


def write_text(file: Path, tokens: int) -> None:
    """Random tokens, twice as many as asked for: the end of a text is set aside."""
    tokenizer = AutoTokenizer.from_pretrained(bundled.model_path())
    drawing = torch.Generator().manual_seed(0)
    ids = torch.randint(2, len(tokenizer), (2 * tokens,), generator=drawing)
    file.write_text(tokenizer.decode(ids.tolist()))
