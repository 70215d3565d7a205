"""Measured speed: reading a prompt, and writing token by token with a cache."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

REPEATS = 5


@dataclass(frozen=True)
class Speed:
    """Tokens per second at batch 1, the best of five runs, and the lengths they were run at.

    The best run is the one that other work on the machine disturbed least.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    prompt_tokens: int
    new_tokens: int


def measure_speed(module: Any, prompt: Tensor, new_tokens: int = 32) -> Speed:
    """Time the forward pass over ``prompt`` (tokens) and greedy decoding behind it."""
    ids = prompt.unsqueeze(0).to(module.device)

    def prefill() -> Any:
        return module(input_ids=ids, use_cache=True)

    def decode(state: Any) -> None:
        cache, last = state.past_key_values, state.logits[:, -1:].argmax(-1)
        for _ in range(new_tokens):
            out = module(input_ids=last, past_key_values=cache, use_cache=True)
            last = out.logits[:, -1:].argmax(-1)

    with torch.inference_mode():
        decode(prefill())  # warm-up
        reading = [_seconds(prefill, module) for _ in range(REPEATS)]
        states = [prefill() for _ in range(REPEATS)]
        writing = [_seconds(lambda state=s: decode(state), module) for s in states]  # type: ignore[misc]
    return Speed(ids.shape[1] / min(reading), new_tokens / min(writing), ids.shape[1], new_tokens)


def _seconds(run: Callable[[], Any], module: Any) -> float:
    _wait(module)
    start = time.perf_counter()
    run()
    _wait(module)
    return time.perf_counter() - start


def _wait(module: Any) -> None:
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)
