"""Which windows of a text calibrate: chosen among more than are needed, instead of at random.

What is chosen is a list of places in the text, so a plan that holds it is made again from the same
windows, without choosing. The choice is kept in the user's cache under all that it depends on.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from secateur.allocate.base import Allocator, Evidence
from secateur.allocate.uniform import Uniform
from secateur.calibration.collect import Store, calibrate
from secateur.calibration.layer_stream import TOKENS_PER_BATCH, Stream
from secateur.data.tasks import CausalLM, Use
from secateur.data.tokens import Calibration, Tokens, calibration_stream, drawn, windows_at
from secateur.io.cache import cached_file, keep
from secateur.io.schema import Record, read_record
from secateur.methods.base import Method
from secateur.methods.fitted import FittedMethod
from secateur.methods.step import Step
from secateur.models.model import Model, fingerprint
from secateur.scoring.evidence import score
from secateur.scoring.plan_scoring import WINDOWS, PlanScorer
from secateur.scoring.prices import prices_of
from secateur.structure.budget import Budget
from secateur.utils.errors import InputError
from secateur.version import __version__

POOL = 4  #: windows to choose from, for each that is chosen
DRAWS = 4  #: random draws to compare by divergence
RANK = 1e-12  #: energy below which a direction is none, relative to the largest
JITTER = 1e-6  #: added to similarities of 1, so that copies of a window can be told apart
MAX_BYTES = 2**26


class ChosenWindows(Record):
    """A choice on disk; what it is of is in the name of its file."""

    windows: tuple[int, ...]


def select_calibration(
    model: Model,
    calibration: Calibration,
    method: Method | None = None,
    budget: Budget | None = None,
    allocator: Allocator | None = None,
    *,
    advance: Callable[[int], None] = lambda _: None,
    folder: Path | None = None,
) -> Calibration:
    """The calibration with its windows chosen as its ``select`` says; the model stays as it was.

    - "leverage": of :data:`POOL` times as many random windows, drawn with chances in proportion to
      the summed :func:`leverage` of their tokens before the middle block.
    - "dpp": of as many, those that :func:`most_diverse` finds by the mean state of a window there.
    - "kl": of :data:`DRAWS` random draws the one with the least divergence of the model that
      ``method`` narrows by it, on windows that are in none of them; see :func:`divergences`.

    Choosing again gives the same. ``method``, ``budget`` and ``allocator``, by default the method's
    own, serve "kl" alone. ``advance`` is told how many of :data:`DRAWS` are done. ``folder`` is
    where the statistics of a draw lie while it is judged, by default the system's temporary one.

    Raises:
        InputError: the text holds too little to choose from, the method can't be judged so, or the
            model is no causal language model.
    """
    check_choice(calibration, model.use)
    if calibration.select == "none" or calibration.windows:
        return calibration
    step: Step | None = None
    if calibration.select == "kl":
        if method is None:
            raise InputError("--select-calibration kl compares narrowed models; name a method.")
        step = cheap(model, Step.of(method, budget, allocator).filled)
    pool = _pool(model, calibration)
    own = _identity(model, calibration, pool.tokens)
    if step is not None:
        own["step"] = step.as_dict()
    path, wanted = cached_file("calibration", own), calibration.samples
    if (kept := _kept(path, pool.order, wanted)) is not None:
        return replace(calibration, windows=kept)
    if step is not None:
        draws = random_draws(len(pool.order) - pool.judged, wanted, calibration.seed)
        read = [pool.tokens[draw] for draw in draws]
        judged = pool.tokens[range(len(pool.order) - pool.judged, len(pool.order))]
        found = divergences(model, step, read, judged, advance=advance, folder=folder)
        chosen = draws[found.index(min(found))]
    else:
        states = MiddleStates(model, pool.tokens)
        if calibration.select == "leverage":
            generator = torch.Generator().manual_seed(calibration.seed)
            chances = leverage(states, pool.tokens.mask).sum(1)
            chosen = torch.multinomial(chances, wanted, generator=generator).tolist()
        else:
            chosen, _ = most_diverse(similarity(means(states, pool.tokens.mask)), wanted)
    windows = tuple(pool.order[place] for place in chosen)
    keep(path, ChosenWindows(windows=windows).model_dump_json())
    return replace(calibration, windows=windows)


@dataclass(frozen=True)
class _Pool:
    """What there is to choose from.

    Attributes:
        order: places of windows in the text, in random order; those to choose from come first.
        judged: how many of the last are set aside to compare draws on.
        tokens: the windows to choose from, and those set aside.
    """

    order: list[int]
    judged: int
    tokens: Tokens


def _pool(model: Model, calibration: Calibration) -> _Pool:
    """The windows of a text to choose from.

    Raises:
        InputError: the text holds too few of them.
    """
    stream, wanted = calibration_stream(calibration, model.tokenizer), calibration.samples
    name, length = f"calibration text {calibration.source!r}", calibration.length
    order = drawn(len(stream) // length, calibration.seed)
    by_kl = calibration.select == "kl"
    judged = min(WINDOWS, max(2, wanted // 4)) if by_kl else 0
    if len(order) <= wanted + judged:
        raise InputError(
            f"{name} is too short to choose from: it has {len(order)} windows of {length} tokens, "
            f"and {wanted + judged} leave no choice. Give more text, fewer --samples or a smaller "
            f"--length, or leave --select-calibration out."
        )
    pool = order if by_kl else order[: POOL * wanted]
    return _Pool(order, judged, windows_at(stream, pool, length, name))


def check_choice(calibration: Calibration, use: Use) -> None:
    """Refuse to choose among what is more than windows of text.

    Raises:
        InputError: a choice is asked for, and the model is no causal language model.
    """
    if calibration.select != "none" and not isinstance(use, CausalLM):
        raise InputError(
            f"--select-calibration {calibration.select} serves {CausalLM.what}s alone; for this "
            f"{use.what} leave it out, and what calibrates is drawn at random."
        )


def _identity(model: Model, calibration: Calibration, pool: Tokens) -> dict[str, Any]:
    return {
        "secateur": __version__,
        "model": fingerprint(model),
        "dtype": str(model.module.dtype).removeprefix("torch."),
        "pool": pool.fingerprint,
        "calibration": calibration.as_dict(),
        "sizes": [POOL, DRAWS, WINDOWS],
    }


def _kept(path: Path, order: Sequence[int], wanted: int) -> tuple[int, ...] | None:
    """A choice that was made before, or None; a damaged one is made again."""
    try:
        found = read_record(ChosenWindows, path, "choice of windows", MAX_BYTES).windows
    except InputError:
        return None
    return found if len(set(found)) == wanted and set(found) <= set(order) else None


def random_draws(count: int, wanted: int, seed: int) -> list[list[int]]:
    """Draws of ``wanted`` places below ``count``; the first takes the first ones.

    Places are in random order already, so the first draw is the one that is made without a choice.
    """
    return [[*range(wanted)]] + [drawn(count, seed + i)[:wanted] for i in range(1, DRAWS)]


def cheap(model: Model, step: Step) -> Step:
    """The step, with one share for all units in place of an allocator that measures losses.

    Raises:
        InputError: the method has units that no share serves, or one that runs through all blocks.
    """
    method, allocator = step.method, step.allocator
    kinds = {unit.kind for unit in step.units(model)}
    dear, reason = allocator.measured or allocator.searches, None
    dear = dear or isinstance(method, FittedMethod)
    if "residual" in kinds:
        reason = "it slices the residual stream, and draws are compared by blocks narrowed alone"
    elif dear and "block" in kinds:
        reason = (
            f"draws are compared without the measuring that allocator {allocator.name!r} does, and "
            f"one share for all units says not which blocks go"
        )
    if reason:
        raise InputError(
            f"--select-calibration kl can't judge {method.name!r}: {reason}. Choose leverage or "
            f"dpp."
        )
    return replace(step, allocator=Uniform()) if dear else step


def divergences(
    model: Model,
    step: Step,
    draws: Sequence[Tokens],
    judged: Tokens,
    *,
    advance: Callable[[int], None] = lambda _: None,
    folder: Path | None = None,
) -> list[float]:
    """For each draw, the divergence on ``judged`` of the model narrowed by what the draw says.

    In nats. Every block is narrowed by statistics of the dense model: nothing is measured
    again behind narrowed blocks, and nothing propagated. The model is left as it was. A draw's
    statistics lie in ``folder``, or the system's temporary one, until the next one's take over.
    """
    method, allocator = step.method, step.allocator
    units, found = step.units(model), []
    prices = prices_of(model, units, step.budget)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    for tokens in draws:
        with TemporaryDirectory(prefix="draw-", dir=folder) as passing:
            store = Store(Path(passing))
            calibrate(model, tokens, method.needs | allocator.needs, store)
            evidence = Evidence({})
            if not isinstance(allocator, Uniform):
                evidence = score(model, method, store, tokens, allocator)
            sizes = allocator.spend(units, evidence, prices, step.budget.share)
            one = {name: [size] for name, size in sizes.items()}
            scorer = PlanScorer(model, method, units, allowed=one, store=store, tokens=judged)
            found.append(scorer(sizes))
        advance(1)
    return found


@dataclass(frozen=True)
class MiddleStates:
    """The hidden states before the middle block, (length, hidden) a window, on the CPU.

    They are computed whenever they are gone through, so that no more than a batch is ever held; of
    a model that is read block by block all are, in memory or on disk, so that it is read once.
    """

    model: Model
    tokens: Tokens

    def __iter__(self) -> Iterator[Tensor]:
        count = len(self.tokens.ids)
        batch = max(1, TOKENS_PER_BATCH // self.tokens.ids.shape[1])
        rows = batch if self.model.offload is None else count
        for first in range(0, count, rows):
            stream = self._reached(self.tokens[range(count)[first : first + rows]])
            for part in stream.batches:
                yield from stream.held[part]

    @torch.no_grad()
    def _reached(self, tokens: Tokens) -> Stream:
        stream = Stream(self.model, tokens)
        for block in self.model.in_turn(self.model.blocks[: len(self.model.blocks) // 2]):
            stream.advance(block)
        return stream


def _real(states: Iterable[Tensor], mask: Tensor) -> Iterator[Tensor]:
    """The states of each window's real tokens as rows, in float64."""
    return (window[real].double() for window, real in zip(states, mask, strict=True))


def means(states: Iterable[Tensor], mask: Tensor) -> Tensor:
    """The mean state of every window's real tokens, (windows, hidden) in float64."""
    return torch.stack([rows.mean(0) for rows in _real(states, mask)])


def leverage(states: Iterable[Tensor], mask: Tensor) -> Tensor:
    """Statistical leverage of every real token among all of them, 0 for others: (windows, length).

    With X the tokens' states as rows and C = XᵀX = V Λ Vᵀ over the directions that have energy,

        ℓ_i = x_iᵀ C⁺ x_i = ‖x_i V Λ^-½‖²,   Σ ℓ_i = rank X

    A token that no others explain has 1, one of n copies at most 1/n. ``states`` holds a window's
    at a time, and is gone through twice: for C, and for the leverages.
    """
    gram = reduce(torch.add, (rows.t() @ rows for rows in _real(states, mask)))
    values, vectors = torch.linalg.eigh(gram)
    there = values > RANK * values[-1]
    whitening = vectors[:, there] / values[there].sqrt()
    found = torch.zeros(mask.shape, dtype=torch.float64)
    for scores, window in zip(found, states, strict=True):
        scores.copy_((window.double() @ whitening).square().sum(1))
    return found * mask


def similarity(features: Tensor) -> Tensor:
    """Gaussian kernel of the rows of (windows, features), its width their median distance.

    Of full rank where rows differ, so that more windows than features can be told apart.
    """
    distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    above = distances[torch.ones_like(distances, dtype=torch.bool).triu(1)]
    width = above[above > 0].median() if bool((above > 0).any()) else distances.new_ones(())
    kernel = torch.exp(-0.5 * (distances / width).square())
    return kernel + JITTER * torch.eye(len(features), dtype=kernel.dtype)


def most_diverse(kernel: Tensor, count: int) -> tuple[list[int], list[float]]:
    """Greedy maximum of log det K_S over sets of ``count`` rows: the order, and what each adds.

    The one that adds most comes next. What i adds to S is log of its Schur complement,

        log det K_S∪i − log det K_S = log (K_ii − K_iS K_SS⁻¹ K_Si)

    which a Cholesky factor that grows by a row a step keeps for all rows. That is the greedy mode
    of a determinantal point process (Chen et al., arXiv 1709.05135, algorithm 1).
    """
    left, factor = kernel.diagonal().clone(), kernel.new_zeros(count, len(kernel))
    chosen: list[int] = []
    gains: list[float] = []
    for step in range(count):
        best = int(left.argmax())
        chosen.append(best)
        gains.append(float(left[best].log()))
        above = factor[:step]
        factor[step] = (kernel[best] - above[:, best] @ above) / left[best].sqrt()
        left -= factor[step].square()
        left[chosen] = -torch.inf
    return chosen, gains
