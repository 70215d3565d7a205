"""Measured speed: reading a prompt, and writing token by token with a cache."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from secateur.data.tokens import Tokens
from secateur.models.model import Model

REPEATS = 5
LEAST_SECONDS = 2.0  # a small model is run more often, as its runs are soon disturbed


@dataclass(frozen=True)
class Speed:
    """Tokens per second at batch 1, best of five runs or more, and the lengths they were run at.

    The best run is the one that other work on the machine disturbed least. Without writing where a
    model only reads; of images, images per second.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float | None
    prompt_tokens: int
    new_tokens: int


def measure_speed(model: Model, prompt: Tokens, new_tokens: int = 32) -> Speed:
    """Time the forward pass over one row, and greedy decoding behind it where the model writes."""
    module: Any = model.module
    inputs = model.use.inputs(prompt.to(model.device))
    writes = model.use.writes
    if writes:
        inputs["use_cache"] = True

    def prefill() -> Any:
        return module(**inputs)

    def decode(state: Any) -> None:
        last = state.logits[:, -1:].argmax(-1)
        for _ in range(new_tokens):
            last = module(**model.use.going_on(last, state)).logits[:, -1:].argmax(-1)

    writing = None
    with torch.inference_mode():
        state = prefill()  # warm-up
        if writes:
            decode(state)
        reading = _best(lambda _: prefill(), lambda: None, module)
        if writes:
            writing = new_tokens / _best(decode, prefill, module)
    read = prompt.length if model.use.reads_text else len(prompt)
    return Speed(read / reading, writing, prompt.length, new_tokens if writes else 0)


def _best(run: Callable[[Any], Any], prepare: Callable[[], Any], module: Any) -> float:
    """Seconds of the fastest of several runs; what ``prepare`` gives each of them is not timed."""
    taken: list[float] = []
    while len(taken) < REPEATS or sum(taken) < LEAST_SECONDS:
        given = prepare()
        _wait(module)
        start = time.perf_counter()
        run(given)
        _wait(module)
        taken.append(time.perf_counter() - start)
    return min(taken)


def _wait(module: Any) -> None:
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)
    elif module.device.type != "cpu":
        float(torch.zeros((), device=module.device))  # a number is read behind all that was asked
