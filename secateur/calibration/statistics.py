"""Additive statistics of activations: sums over real tokens, mergeable, divided out on reading.

A statistic is created empty, fed batches with a mask of the tokens that count, and read once. The
products of a batch are made in float32 (or float64, if that is what the model computes in) and
summed over batches in float64, on the device or where else it has that (exact.py). Every reading is
a mean over tokens, so that ridges relative to it have no unit.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Self

import torch
from torch import Tensor

from secateur.linalg.symmetric import add_product, bands, mirrored
from secateur.utils.errors import InputError
from secateur.utils.precision import exact, exact_device


class Statistic(ABC):
    """A float64 sum over tokens and the number of tokens in it.

    ``most_tokens`` is where a statistic that is dear to collect has seen enough.
    """

    #: what it is called in files; never changes, since kept statistics are found by it
    id: ClassVar[str]
    most_tokens: ClassVar[int | None] = None
    #: what it sums, for messages
    what: ClassVar[str] = "activations"

    def __init__(self, total: Tensor | None = None, tokens: int = 0) -> None:
        self.total = total
        self.tokens = tokens
        self.ahead = 0  # tokens that another process has seen before these

    @property
    def wants_more(self) -> bool:
        """Whether more tokens would make it better by enough to be worth their price."""
        return self.most_tokens is None or self.ahead + self.tokens < self.most_tokens

    @abstractmethod
    def summed(self, *values: Tensor, mask: Tensor) -> Tensor:
        """The sum over the tokens of one batch where ``mask`` (batch, tokens) is true."""

    @classmethod
    @abstractmethod
    def shape(cls, *features: int) -> tuple[int, ...]:
        """Of the sum, for tokens of so many features, see :meth:`Block.features`."""

    @classmethod
    def squares(cls, total: Tensor) -> Tensor:
        """Those numbers of a sum that can't be negative."""
        return total.new_zeros(0)

    def update(self, *values: Tensor, mask: Tensor) -> None:
        """Add a batch: ``values`` (batch, tokens, …)."""
        self.total = self.onto(self.total, *values, mask=mask)
        self.tokens += int(mask.sum())

    def onto(self, total: Tensor | None, *values: Tensor, mask: Tensor) -> Tensor:
        """``total``, which may be changed, with the sum of a batch."""
        added = exact(self.summed(*map(wide, values), mask=mask))
        return added if total is None else total.add_(added)

    def parts(self) -> dict[str, Tensor]:
        """The sum as tensors for a file, by what their names end in; none where there is none."""
        return {} if self.total is None else {"": self.total.contiguous()}

    @classmethod
    def of_parts(cls, part: Callable[[str], Tensor], tokens: int) -> Self:
        """Again from what ``part`` reads of :meth:`parts`."""
        return cls(part(""), tokens)

    def to(self, device: torch.device | str) -> Self:
        """Move the sum to a device."""
        self.total = None if self.total is None else self.total.to(device)
        return self

    @property
    def mean(self) -> Tensor:
        """The sum divided by the number of tokens, float64.

        Raises:
            InputError: no token was seen, or a sum is not finite.
        """
        return self.checked() / self.tokens

    def checked(self) -> Tensor:
        """The sum.

        Raises:
            InputError: no token was seen, or a sum is not finite.
        """
        if self.total is None or self.tokens == 0:
            raise InputError("calibration saw no token; give it more text.")
        if not bool(torch.isfinite(self.telling(self.total)).all()):
            raise InputError(
                f"calibration met NaN or infinite {self.what}; try --dtype float32, or check the "
                f"model with `secateur eval`."
            )
        return self.total

    def telling(self, total: Tensor) -> Tensor:
        """A part of the sum that is finite only where all of it is."""
        return total


class Additive(Statistic):
    """One whose sum over all tokens is that of any parts of them."""

    def merge(self, other: Self) -> None:
        """Add what another process or batch has summed."""
        if other.total is not None:
            self.total = other.total.clone() if self.total is None else self.total + other.total
            self.tokens += other.tokens


def wide(values: Tensor) -> Tensor:
    """At least float32: a sum of squares in float16 overflows, in bfloat16 it loses its digits."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def real(values: Tensor, mask: Tensor) -> Tensor:
    """The rows of real tokens, (tokens, …); no copy where all are."""
    return values.flatten(0, mask.dim() - 1) if bool(mask.all()) else values[mask]


class Gram(Additive):
    """Σ xᵀx of (batch, tokens, n) activations: (n, n), summed on and above the diagonal alone."""

    id: ClassVar[str] = "Gram"

    def onto(self, total: Tensor | None, *values: Tensor, mask: Tensor) -> Tensor:
        rows = real(values[0], mask)
        if total is None:
            shape, home = (rows.shape[1], rows.shape[1]), exact_device(rows.device)
            total = torch.zeros(shape, dtype=torch.float64, device=home)
        rows = rows if rows.is_cuda else wide(rows)  # a GPU has products of half precision
        return add_product(total, rows, rows)

    def summed(self, *values: Tensor, mask: Tensor) -> Tensor:
        return self.onto(None, *values, mask=mask)

    def parts(self) -> dict[str, Tensor]:
        """Bands of rows from the diagonal on: half of the square."""
        return {} if self.total is None else {f".{i}": b for i, b in bands(self.total)}

    @classmethod
    def of_parts(cls, part: Callable[[str], Tensor], tokens: int) -> Self:
        """The square, of which only what was stored counts; one band is in memory beside it."""
        first = part(".0")
        total = first.new_zeros(first.shape[1], first.shape[1])
        for start, band in bands(total):
            band.copy_(part(f".{start}") if start else first)
        return cls(total, tokens)

    @classmethod
    def shape(cls, *features: int) -> tuple[int, ...]:
        return *features, *features

    @classmethod
    def squares(cls, total: Tensor) -> Tensor:
        return total.diagonal()

    def telling(self, total: Tensor) -> Tensor:
        """The diagonal: no product of two numbers is beyond both of their squares."""
        return total.diagonal()

    @property
    def mean(self) -> Tensor:
        """The whole mean."""
        return mirrored(super().mean)


class HeadGram(Additive):
    """Σ xᵀx of each head of (batch, tokens, heads, n) activations: (heads, n, n)."""

    id: ClassVar[str] = "HeadGram"

    @classmethod
    def shape(cls, *features: int) -> tuple[int, ...]:
        return *features, features[-1]

    @classmethod
    def squares(cls, total: Tensor) -> Tensor:
        return total.diagonal(dim1=1, dim2=2)

    def summed(self, *values: Tensor, mask: Tensor) -> Tensor:
        rows = real(values[0], mask).transpose(0, 1)  # heads, tokens, n
        return rows.transpose(1, 2) @ rows


class Energy(Additive):
    """Σ x² of every coordinate of (batch, tokens, …) activations: the diagonal of a Gram."""

    id: ClassVar[str] = "Energy"

    @classmethod
    def shape(cls, *features: int) -> tuple[int, ...]:
        return features

    @classmethod
    def squares(cls, total: Tensor) -> Tensor:
        return total

    def summed(self, *values: Tensor, mask: Tensor) -> Tensor:
        return real(values[0], mask).square().sum(0)


class Moments(Additive):
    """Σ x and Σ x² of every coordinate of (batch, tokens, n) activations: (2, n).

    Both in float64, as a variance is a small difference of large sums where a mean is large.
    """

    id: ClassVar[str] = "Moments"

    @classmethod
    def shape(cls, *features: int) -> tuple[int, ...]:
        return 2, *features

    @classmethod
    def squares(cls, total: Tensor) -> Tensor:
        return total[1]

    def summed(self, *values: Tensor, mask: Tensor) -> Tensor:
        rows = exact(values[0][mask])
        return torch.stack((rows.sum(0), rows.square().sum(0)))

    @property
    def variance(self) -> Tensor:
        """Mean squared deviation from the mean: (n)."""
        first, second = self.mean.unbind()
        return (second - first.square()).clamp_min(0.0)


class Influence(Additive):
    """Σ (1 − cosine) between a block's input and output, both (batch, tokens, hidden).

    The mean is the block influence of ShortGPT (arXiv 2403.03853, equation 1).
    """

    id: ClassVar[str] = "Influence"

    @classmethod
    def shape(cls, *features: int) -> tuple[int, ...]:
        return ()

    def summed(self, *values: Tensor, mask: Tensor) -> Tensor:
        before, after = values
        before, after = exact(before[mask]), exact(after[mask])
        return (1 - torch.cosine_similarity(before, after, -1)).sum()


class Change(Additive):
    """What a block makes of its input x, with y its output, both (batch, tokens, hidden).

    Σ (y − x), Σ ‖y − x‖² and Σ ‖y‖² behind one another, in float64: (hidden + 2).
    """

    id: ClassVar[str] = "Change"

    @classmethod
    def shape(cls, *features: int) -> tuple[int, ...]:
        return (features[0] + 2,)

    @classmethod
    def squares(cls, total: Tensor) -> Tensor:
        return total[-2:]

    def summed(self, *values: Tensor, mask: Tensor) -> Tensor:
        before, after = (exact(value[mask]) for value in values)
        change = after - before
        energies = torch.stack((change.square().sum(), after.square().sum()))
        return torch.cat((change.sum(0), energies))


class Angle(Additive):
    """Σ arccos(cosine) / π between a block's input and output, both (batch, tokens, hidden)."""

    id: ClassVar[str] = "Angle"

    @classmethod
    def shape(cls, *features: int) -> tuple[int, ...]:
        return ()

    @classmethod
    def squares(cls, total: Tensor) -> Tensor:
        return total

    def summed(self, *values: Tensor, mask: Tensor) -> Tensor:
        before, after = (exact(value[mask]) for value in values)
        cosine = torch.cosine_similarity(before, after, -1).clamp(-1, 1)
        return cosine.arccos().sum() / torch.pi


class Cross(Additive):
    """Σ xᵀt of features (batch, tokens, n) and targets (batch, tokens, outputs): (n, outputs)."""

    id: ClassVar[str] = "Cross"

    @classmethod
    def shape(cls, *features: int) -> tuple[int, ...]:
        return features

    def summed(self, *values: Tensor, mask: Tensor) -> Tensor:
        features, targets = values
        return real(features, mask).t() @ real(targets, mask)
