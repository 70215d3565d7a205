"""Log-probability of a continuation given a context, tokenized as lm-evaluation-harness does."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from secateur.calibration.forward_batches import batches
from secateur.data.tokens import Tokens
from secateur.models.model import Model
from secateur.utils.errors import InputError
from secateur.utils.precision import exact

FALLBACK_POSITIONS = 2048  # where neither config nor tokenizer says how long an input may be
LIKE = 0.75  # of the longest that a row is run with
BOUNDLESS = 10**9  # tokenizers say 10³⁰ where they mean that nothing is known


@dataclass(frozen=True)
class Pair:
    """A context and a continuation, as token ids."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Likelihood:
    """Sum of a continuation's log-probabilities, and whether each token is the top-1 prediction."""

    total: float
    greedy: bool


def encoded(tokenizer: Any, context: str, continuation: str) -> Pair:
    """Both encoded as one text and split behind as many tokens as the context alone has.

    Space at the context's end goes to the continuation. Without a context the start token stands
    for it, or the end token where there is none. Special tokens are those the tokenizer adds.

    Raises:
        InputError: nothing is left on one of the sides.
    """
    bare = context.rstrip()
    continuation, context = context[len(bare) :] + continuation, bare
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if not context:
        if start is None:
            raise InputError(
                f"a context is empty, and the tokenizer has no start or end token to stand for it "
                f"before {continuation[:40]!r}; give every item a context."
            )
        ids = list(tokenizer.encode(continuation, add_special_tokens=False))
        pair = Pair((start,), tuple(ids)) if ids[:1] != [start] else _split(ids, 1)
    else:
        begun = start is not None and context.startswith(tokenizer.decode(start))
        options = {"add_special_tokens": False} if begun else {}
        whole = list(tokenizer.encode(context + continuation, **options))
        pair = _split(whole, len(tokenizer.encode(context, **options)))
    if not pair.context or not pair.continuation:
        raise InputError(
            f"{continuation[:40]!r} behind {context[-40:]!r} has no token of its own; make it "
            f"longer, or end the context before a space."
        )
    return pair


def _split(ids: Sequence[int], place: int) -> Pair:
    return Pair(tuple(ids[:place]), tuple(ids[place:]))


def longest_input(model: Model) -> int:
    """Maximum number of tokens per input."""
    said = model.positions or getattr(model.tokenizer, "model_max_length", None)
    return FALLBACK_POSITIONS if said is None or said > BOUNDLESS else int(said)


def likelihoods(
    model: Model, pairs: Sequence[Pair], advance: Callable[[int], None] = lambda _: None
) -> list[Likelihood]:
    """One for each pair, in their order; they are run longest first, those of like length together.

    A model that is read block by block is gone through once for each of these. What is too long
    loses tokens at its start. ``advance`` is told how many are done.

    Raises:
        InputError: a continuation alone is too long, or an output is not finite.
    """
    room = longest_input(model)
    if (most := max((len(pair.continuation) for pair in pairs), default=0)) > room:
        raise InputError(
            f"a continuation has {most} tokens, more than the {room} that the model reads; make it "
            f"shorter."
        )
    rows = [[*pair.context, *pair.continuation][-room - 1 : -1] for pair in pairs]
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), rows[i]))
    found: dict[int, Likelihood] = {}
    while len(found) < len(order):
        left = order[len(found) :]
        together = [i for i in left if len(rows[i]) >= LIKE * len(rows[left[0]])]
        waiting = iter(together)
        for _, several in batches(model, padded([rows[i] for i in together]), advance):
            for logits, i in zip(several, waiting, strict=False):
                wanted = torch.tensor(pairs[i].continuation, device=logits.device)
                own = logits[len(rows[i]) - len(wanted) : len(rows[i])].float()
                every = torch.arange(len(wanted), device=wanted.device)
                said = own.log_softmax(-1)[every, wanted]
                greedy = bool((own.argmax(-1) == wanted).all())
                found[i] = Likelihood(_finite(float(exact(said).sum())), greedy)
    return [found[i] for i in range(len(rows))]


def padded(rows: Sequence[Sequence[int]]) -> Tokens:
    """Rows padded at the end to the length of the first, which is the longest."""
    ids = torch.zeros(len(rows), len(rows[0]), dtype=torch.int64)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
        mask[place, : len(row)] = True
    return Tokens(ids, mask)


def _finite(total: float) -> float:
    if not abs(total) <= sys.float_info.max:
        raise InputError("a log-probability is not finite: an output holds NaN or infinities.")
    return total
