"""Speed of prefill (one pass over a prompt) and of decode (token by token, with a cache)."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from secateur.data.tokens import Tokens
from secateur.models.model import Model

REPEATS = 5
LEAST_SECONDS = 2.0  # short runs are repeated until they add up to this


@dataclass(frozen=True)
class Speed:
    """Tokens per second at batch size 1 (best of at least five runs), and the lengths used.

    The best run is the one that other work on the machine disturbed least. The decode rate is None
    where a model does not generate text. The rates of image models are images per second.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float | None
    prompt_tokens: int
    new_tokens: int


def measure_speed(model: Model, prompt: Tokens, new_tokens: int = 32) -> Speed:
    """Time prefill over the prompt and, if the model generates text, greedy decoding after it."""
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

    decode_rate = None
    with torch.inference_mode():
        state = prefill()  # warm-up
        if writes:
            decode(state)
        seconds = _best(lambda _: prefill(), lambda: None, module)
        if writes:
            decode_rate = new_tokens / _best(decode, prefill, module)
    read = prompt.length if model.use.reads_text else len(prompt)
    return Speed(read / seconds, decode_rate, prompt.length, new_tokens if writes else 0)


def _best(run: Callable[[Any], Any], prepare: Callable[[], Any], module: Any) -> float:
    """Seconds of the fastest of several runs; ``prepare``, called before each, is not timed."""
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
        float(torch.zeros((), device=module.device))  # reading a number waits for all queued work
