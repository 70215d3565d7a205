"""Does it find again what stood far before? A key planted in a long text."""

import inspect
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from secateur.model import Model

SENTENCE, WORD = "\nThe secret word is", " {}"
WORDS = (
    *("river", "garden", "winter", "silver", "basket", "hammer", "orange", "valley", "mirror"),
    *("candle", "doctor", "yellow", "pepper", "thunder", "island", "needle", "kitten", "fox"),
)
KEYS = 4
DEPTHS = (0.1, 0.5, 0.9)
SHARES = (0.25, 0.5, 1.0)  # of the longest input
LONGEST = 4096  # or all positions of a shorter model: the cost of one more is quadratic
LEAST = 64


def keys_of(tokenizer: Any) -> dict[str, list[int]]:
    """The first words whose tokens differ from the first on, so that one output tells them apart.

    Behind the sentence, which must end where they begin.
    """
    before = _ids(tokenizer, SENTENCE)
    found: dict[str, list[int]] = {}
    for word in WORDS:
        ids = _ids(tokenizer, SENTENCE + WORD.format(word))
        own = ids[len(before) :]
        if ids[: len(before)] != before or not own or own[0] in {x[0] for x in found.values()}:
            continue
        found[word] = own
        if len(found) == KEYS:
            break
    return found


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def planted(
    filler: Sequence[int], fact: Sequence[int], asked: Sequence[int], depth: float, length: int
) -> list[int]:
    """So many tokens: filler with a fact at a share of its length, and the question."""
    room = length - len(fact) - len(asked)
    place = round(depth * room)
    return [*filler[:place], *fact, *filler[place:room], *asked]


def recall(
    model: Model, filler: Tensor, advance: Callable[[int], None] = lambda _: None
) -> dict[str, Any]:
    """How well the right key is known among the others, over lengths, depths and keys.

    ``found`` is the share where it is the likeliest of them, 1/n by chance. ``nats`` is the mean of
    ln p(right) + ln n, p among the keys alone: 0 for who knows nothing, ln n at most, and still
    telling where a small model never puts the right one first. Empty where the text is too short or
    the tokenizer can't tell words apart. ``filler`` is one row of ids.
    """
    keys = keys_of(model.tokenizer)
    asked = _ids(model.tokenizer, SENTENCE)
    longest = min(LONGEST, model.positions or sys.maxsize, len(filler))
    lengths = [n for share in SHARES if (n := int(share * longest)) >= LEAST]
    if len(keys) < 2 or not lengths:
        return {}
    stop = _ids(model.tokenizer, ".\n")
    firsts = torch.tensor([ids[0] for ids in keys.values()])
    said: dict[tuple[int, float], list[tuple[float, float]]] = {}
    for length in lengths:
        for depth in DEPTHS:
            for right, ids in enumerate(keys.values()):
                start = right * (len(filler) - longest) // len(keys)
                text = filler[start : start + length].tolist()
                row = planted(text, [*asked, *ids, *stop], asked, depth, length)
                given = _last(model, row)[firsts].log_softmax(-1)
                hit = float(given.argmax() == right)
                said.setdefault((length, depth), []).append((hit, float(given[right])))
                advance(1)
    return _summed(said, len(keys))


def steps() -> int:
    """How many inputs :func:`recall` runs at most."""
    return len(SHARES) * len(DEPTHS) * KEYS


def _summed(said: dict[tuple[int, float], list[tuple[float, float]]], keys: int) -> dict[str, Any]:
    def mean(places: Sequence[tuple[int, float]]) -> dict[str, float]:
        own = [pair for place in places for pair in said[place]]
        return {
            "found": sum(hit for hit, _ in own) / len(own),
            "nats": sum(log for _, log in own) / len(own) + math.log(keys),
        }

    lengths, depths = (list(dict.fromkeys(place[i] for place in said)) for i in (0, 1))
    return {
        **mean([*said]),
        "keys": keys,
        "by_length": {str(n): mean([p for p in said if p[0] == n]) for n in lengths},
        "by_depth": {f"{d:g}": mean([p for p in said if p[1] == d]) for d in depths},
    }


def _last(model: Model, row: Sequence[int]) -> Tensor:
    """Logits of what comes behind a row."""
    module: Any = model.module
    keep = "logits_to_keep" in inspect.signature(module.forward).parameters
    ids = torch.tensor([row], device=model.device)
    with torch.inference_mode():
        out = module(input_ids=ids, use_cache=False, **({"logits_to_keep": 1} if keep else {}))
    logits: Tensor = out.logits[0, -1]
    return logits.double().cpu()
