"""What each rotary pair of a head adds to the output of attention, summed over tokens."""

from typing import ClassVar

import torch
from torch import Tensor

from secateur.calibration.statistics import Additive
from secateur.utils.precision import exact


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

    id: ClassVar[str] = "PairScores"

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
