"""StableLM: Llama's shape, partial rotary positions, a list of norms inside the heads or none."""

from dataclasses import replace

from secateur.families.llama import LLAMA

STABLELM = replace(LLAMA, family="StableLM", model_types=("stablelm",), head_norms="list")
