"""Recall of a key that was planted in a long text."""

import inspect
import sys
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from secateur.calibration.forward_batches import last_logits
from secateur.data.tokens import Tokens
from secateur.evaluate.significance import Figures, standard_error
from secateur.models.model import Model

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
    """Filler with a fact at a share of its length, followed by the question; so many tokens."""
    room = length - len(fact) - len(asked)
    place = round(depth * room)
    return [*filler[:place], *fact, *filler[place:room], *asked]


def recall(
    model: Model, filler: Tensor, advance: Callable[[int], None] = lambda _: None
) -> dict[str, Any]:
    """How much more probable a key is where it was planted than where another was.

    At each length and depth every key is planted in the same text. ``nats`` is the mean over keys k
    of ln p(k | k planted) less the mean of ln p(k | another planted): 0 for who reads nothing,
    whatever words the model likes. ``found`` is the share of texts whose key is the one that gains
    most over its mean; 1/n by chance. Empty where the text is too short or the tokenizer can't tell
    words apart. ``filler`` is one row of ids; ``advance`` is told how many inputs were run.
    """
    keys = keys_of(model.tokenizer)
    asked = _ids(model.tokenizer, SENTENCE)
    longest = min(LONGEST, model.positions or sys.maxsize, len(filler))
    lengths = [n for share in SHARES if (n := int(share * longest)) >= LEAST]
    if len(keys) < 2 or not lengths:
        return {}
    stop = _ids(model.tokenizer, ".\n")
    firsts = torch.tensor([ids[0] for ids in keys.values()])
    said: dict[tuple[int, float], Tensor] = {}
    for length, depth in product(lengths, DEPTHS):
        start = len(said) * (len(filler) - length) // (len(lengths) * len(DEPTHS))
        text = filler[start : start + length].tolist()
        rows = [planted(text, [*asked, *k, *stop], asked, depth, length) for k in keys.values()]
        own = _last(model, torch.tensor(rows), advance)
        said[length, depth] = own.log_softmax(-1)[:, firsts]
    return {
        **contrast([*said.values()]),
        "keys": len(keys),
        "by_length": {
            str(n): contrast([t for (m, _), t in said.items() if m == n]) for n in lengths
        },
        "by_depth": {
            f"{d:g}": contrast([t for (_, e), t in said.items() if e == d]) for d in DEPTHS
        },
    }


def contrast(tables: Sequence[Tensor]) -> Figures:
    """``found`` and ``nats`` of tables (planted, asked) of log-probabilities.

    ``stderr`` is the standard error of ``nats`` over the texts.
    """
    every = torch.stack([*tables])
    own = every.diagonal(dim1=1, dim2=2)
    others = (every.sum(1) - own) / (every.shape[1] - 1)
    best = (every - every.mean(1, keepdim=True)).argmax(-1)
    right = best == torch.arange(every.shape[1])
    nats = (own - others).mean(1)
    return {
        "found": float(right.double().mean()),
        "nats": float(nats.mean()),
        "stderr": standard_error(nats),
    }


def steps() -> int:
    """Maximum number of inputs that :func:`recall` runs."""
    return len(SHARES) * len(DEPTHS) * KEYS


def _last(model: Model, rows: Tensor, advance: Callable[[int], None]) -> Tensor:
    """Logits after the last token of each row."""
    if model.offload is not None:  # read once for all of them
        return last_logits(model, Tokens(rows, torch.ones_like(rows, dtype=torch.bool)), advance)
    module: Any = model.module
    keep = "logits_to_keep" in inspect.signature(module.forward).parameters
    options, found = {"logits_to_keep": 1} if keep else {}, []
    for row in rows.to(model.device).split(1):
        with torch.inference_mode():
            out = module(input_ids=row, use_cache=False, **options)
        found.append(out.logits[:, -1].cpu().double())
        advance(1)
    return torch.cat(found)
