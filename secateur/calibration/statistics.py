"""Additive statistics of activations: sums over real tokens, mergeable, divided out on reading.

A statistic is created empty, fed batches with a mask of the tokens that count, and read once. The
products of a batch are made in float32 (or float64, if that is what the model computes in) and
summed over batches in float64, on the device or where else it has that (exact.py). Every reading is
a mean over tokens, so that ridges relative to it have no unit.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from secateur.linalg.symmetric import add_product, bands, mirrored
from secateur.utils.errors import InputError
from secateur.utils.precision import exact, exact_device


class Statistic(ABC):
    """A float64 sum over tokens and the number of tokens in it.

    ``most_tokens`` is where a statistic that is dear to collect has seen enough.
    """

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

    @classmethod
    def shape(cls, *features: int) -> tuple[int, ...]:
        return features

    def summed(self, *values: Tensor, mask: Tensor) -> Tensor:
        features, targets = values
        return real(features, mask).t() @ real(targets, mask)


class PairScores(Additive):
    """What each rotary pair of a head adds to the attention's output: (kv heads, 2 pairs, 2 pairs).

    For a query head, let S_p[t, s] be what pair p adds to the score of query t and key s, A the
    attention weights and u_s the value as the output projection maps it. To first order, pair p
    adds to the output of token t

        o_p[t] = Σ_s A[t, s] (S_p[t, s] − Σ_r A[t, r] S_p[t, r]) u_s

    (the derivative of the softmax), and this is Σ_t ⟨o_p[t], o_r[t]⟩ over pairs p, r, summed over
    the query heads that read a KV head. The second half of the features is the same pairs with the
    query turned by 90°, S'_p, which a gain on a kept pair can mix in. Dims that don't rotate have
    no partner: both halves then hold single coordinates.

    As S_p is a product of a query's and a key's coordinates, the sum over s is one of A with keys
    times values, and no scores of single pairs are ever made.

    Takes queries (batch, heads, tokens, width) and keys (batch, kv heads, tokens, width) after
    rotation, the first already scaled; values (batch, heads, tokens, any) in a basis in which the
    output's metric is the identity; which pairs turn (pairs), bool; how many tokens back a query
    sees, itself counted, or 0 where it sees both sides; and, where there are such, the cap c of
    scores (0 where only the next is there) and their bias by position (heads, tokens, tokens). With
    a cap the softmax is taken of c tanh(S / c), and S_p counts times the slope 1 − tanh²(S[t, s] /
    c) there. The bias is added to the scores and belongs to no pair.
    """

    most_tokens = 4096

    @classmethod
    def shape(cls, *features: int) -> tuple[int, ...]:
        return *features, features[-1]

    @classmethod
    def squares(cls, total: Tensor) -> Tensor:
        return total.diagonal(dim1=1, dim2=2)

    def summed(self, *values: Tensor, mask: Tensor) -> Tensor:
        query, key, value, turning, window, *more = values
        cap = more[0] if more else query.new_zeros(())
        capped = bool(cap)
        bias = more[1] if len(more) > 1 else query.new_zeros(query.shape[1], 1, 1)
        group, turn = query.shape[1] // key.shape[1], turning.bool()[:, None]
        tokens = torch.arange(mask.shape[1], device=mask.device)
        back = tokens.unsqueeze(1) - tokens
        unseen = (back < 0) | (back >= window) if int(window) else torch.zeros_like(back).bool()
        total = exact(query.new_zeros(key.shape[1], query.shape[-1], query.shape[-1]))
        one = value.new_ones(value.shape[2], 1)
        for row in range(len(query)):
            for head in range(query.shape[1]):
                q, k, u = query[row, head], key[row, head // group], value[row, head]
                scores = q @ k.t()
                slopes = scores.new_ones(())
                if capped:
                    bent = (scores / cap).tanh()
                    scores, slopes = bent * cap, 1 - bent.square()
                weights = (scores + bias[head]).masked_fill(unseen, -torch.inf).softmax(-1)
                read = torch.cat((u, one), 1)  # the column of ones gives the mean of S_p
                products = k.unsqueeze(2) * read.unsqueeze(1)  # tokens, coordinates, any + 1
                mixed = (weights * slopes @ products.flatten(1)).view_as(products)
                (q1, q2), (m1, m2) = q.unsqueeze(2).chunk(2, 1), mixed.chunk(2, 1)
                first = torch.where(turn, q1 * m1 + q2 * m2, q1 * m1)
                second = torch.where(turn, q1 * m2 - q2 * m1, q2 * m2)
                added = torch.cat((first, second), 1)
                added = added[..., :-1] - added[..., -1:] * (weights @ u).unsqueeze(1)
                added = added[mask[row]].transpose(0, 1).flatten(1)
                total[head // group] += exact(added @ added.t())
        return total


class Need(NamedTuple):
    """A statistic of the activations at one place in a block.

    Places: "hidden" (MLP hidden channels, as the consumer reads them), "query" and "key" (heads
    before rotation, after any norm inside them), "value" (heads without bias), "mixed" (values
    without bias, mixed by attention, as the output projection reads them), "scores" (see
    :class:`PairScores`), "block" (input and output of the block), "between" and "behind" (the
    residual stream behind attention, where blocks have it, and behind the block),
    "attention_inputs", "output_inputs" and "mlp_inputs" (what the linears of attention, its output
    projection and the MLP's producers read, biases and all). How many features a token has at each
    says :meth:`~secateur.models.block.Block.features`.
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
    ANGLE: ClassVar = Need("block", Angle)
    CHANGE: ClassVar = Need("block", Change)
    MIXED_GRAM: ClassVar = Need("mixed", Gram)
    HIDDEN_ENERGY: ClassVar = Need("hidden", Energy)
    HIDDEN_MOMENTS: ClassVar = Need("hidden", Moments)
    MIXED_MOMENTS: ClassVar = Need("mixed", Moments)
    PAIR_SCORES: ClassVar = Need("scores", PairScores)
    BETWEEN_GRAM: ClassVar = Need("between", Gram)
    BEHIND_GRAM: ClassVar = Need("behind", Gram)
    HIDDEN_TARGET: ClassVar = Need("hidden", Cross)
    MIXED_TARGET: ClassVar = Need("mixed", Cross)
    ATTENTION_INPUT_GRAM: ClassVar = Need("attention_inputs", Gram)
    OUTPUT_INPUT_GRAM: ClassVar = Need("output_inputs", Gram)
    MLP_INPUT_GRAM: ClassVar = Need("mlp_inputs", Gram)


#: of what reads an MLP's channels and of what reads whole heads, by the kind of the axis
GRAMS = {"mlp": Needs.HIDDEN_GRAM, "heads": Needs.MIXED_GRAM}
MOMENTS = {"mlp": Needs.HIDDEN_MOMENTS, "heads": Needs.MIXED_MOMENTS}
#: of what each linear of a block reads, by the place where that is seen
INPUTS = {
    "attention_inputs": Needs.ATTENTION_INPUT_GRAM,
    "output_inputs": Needs.OUTPUT_INPUT_GRAM,
    "mlp_inputs": Needs.MLP_INPUT_GRAM,
    "hidden": Needs.HIDDEN_GRAM,
}
