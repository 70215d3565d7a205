"""Additive statistics of activations: sums over real tokens, mergeable, divided out on reading.

A statistic is created empty, fed batches with a mask of the tokens that count, and read once. The
products of a batch are made in float32 (or float64, if that is what the model computes in) and
summed over batches in float64. Every reading is a mean over tokens, so that ridges relative to it
have no unit.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from secateur.errors import InputError


class Statistic(ABC):
    """A float64 sum over tokens and the number of tokens in it."""

    def __init__(self, total: Tensor | None = None, tokens: int = 0) -> None:
        self.total = total
        self.tokens = tokens

    @abstractmethod
    def summed(self, values: Tensor, mask: Tensor) -> Tensor:
        """The sum over the tokens of one batch where ``mask`` (batch, tokens) is true."""

    def update(self, values: Tensor, mask: Tensor) -> None:
        """Add a batch: ``values`` (batch, tokens, …)."""
        added = self.summed(_wide(values), mask).double()
        self.total = added if self.total is None else self.total.add_(added)
        self.tokens += int(mask.sum())

    def to(self, device: torch.device | str) -> Self:
        """Move the sum to a device."""
        self.total = None if self.total is None else self.total.to(device)
        return self

    def merge(self, other: Self) -> None:
        """Add what another process or batch has summed."""
        if other.total is not None:
            self.total = other.total.clone() if self.total is None else self.total + other.total
            self.tokens += other.tokens

    @property
    def mean(self) -> Tensor:
        """The sum divided by the number of tokens, float64.

        Raises:
            InputError: no token was seen, or a sum is not finite.
        """
        if self.total is None or self.tokens == 0:
            raise InputError("calibration saw no token; give it more text.")
        if not bool(torch.isfinite(self.total).all()):
            raise InputError(
                "calibration met NaN or infinite activations; try --dtype float32, or check the "
                "model with `secateur eval`."
            )
        return self.total / self.tokens


def _wide(values: Tensor) -> Tensor:
    """At least float32: a sum of squares in float16 overflows, in bfloat16 it loses its digits."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


class Gram(Statistic):
    """Σ xᵀx of (batch, tokens, n) activations: (n, n)."""

    def summed(self, values: Tensor, mask: Tensor) -> Tensor:
        rows = values[mask]
        return rows.t() @ rows


class HeadGram(Statistic):
    """Σ xᵀx of each head of (batch, tokens, heads, n) activations: (heads, n, n)."""

    def summed(self, values: Tensor, mask: Tensor) -> Tensor:
        rows = values[mask].transpose(0, 1)  # heads, tokens, n
        return rows.transpose(1, 2) @ rows


class Energy(Statistic):
    """Σ x² of every coordinate of (batch, tokens, …) activations: the diagonal of a Gram."""

    def summed(self, values: Tensor, mask: Tensor) -> Tensor:
        return values[mask].square().sum(0)


class Influence(Statistic):
    """Σ (1 − cosine) between a block's input and output; values (batch, tokens, 2, hidden).

    The mean is the block influence of ShortGPT (arXiv 2403.03853, equation 1).
    """

    def summed(self, values: Tensor, mask: Tensor) -> Tensor:
        before, after = values[mask].double().unbind(1)
        return (1 - torch.cosine_similarity(before, after, -1)).sum()


class Need(NamedTuple):
    """A statistic of the activations at one place in a block.

    Places: "hidden" (MLP hidden channels, as the consumer reads them), "query" and "key" (heads
    before rotation, after any norm inside them), "value" (heads without bias), "block" (input and
    output of the block).
    """

    place: str
    kind: type[Statistic]


BlockStatistics = Mapping[Need, Statistic]


class Needs:
    """The statistics in use, and their names on disk."""

    HIDDEN_GRAM: ClassVar = Need("hidden", Gram)
    QUERY_ENERGY: ClassVar = Need("query", Energy)
    KEY_ENERGY: ClassVar = Need("key", Energy)
    VALUE_GRAM: ClassVar = Need("value", HeadGram)
    INFLUENCE: ClassVar = Need("block", Influence)
