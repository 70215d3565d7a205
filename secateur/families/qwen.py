"""Qwen2 (biases on q, k, v) and Qwen3 (norms inside the heads): Llama's shape otherwise."""

from dataclasses import replace

from secateur.families.llama import LLAMA

QWEN2 = replace(LLAMA, family="Qwen2", model_types=("qwen2",))
QWEN3 = replace(LLAMA, family="Qwen3", model_types=("qwen3",))
