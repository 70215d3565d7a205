"""What an MLP reads and should give, on all tokens, some of them at a time."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from secateur.distributed.collectives import ALONE, Ranks

#: inputs (tokens, hidden) and targets (tokens, outputs) of some tokens
Piece = tuple[Tensor, Tensor]


class TokenBatches:
    """Pieces that can be gone through again and again; each is in memory while it is asked for.

    On several ``ranks`` each has pieces of its own; ``ahead`` is how many tokens the ranks before
    it have.
    """

    def __init__(
        self, pieces: Callable[[], Iterable[Piece]], ahead: int = 0, ranks: Ranks = ALONE
    ) -> None:
        self._pieces = pieces
        self._ahead = ahead
        self.ranks = ranks

    def __iter__(self) -> Iterator[Piece]:
        return iter(self._pieces())

    def where(self, chosen: Callable[[Tensor], Tensor]) -> "TokenBatches":
        """Those that are chosen by their number among the tokens of all ranks."""

        def pieces() -> Iterator[Piece]:
            at = self._ahead
            for inputs, targets in self:
                keep = chosen(torch.arange(at, at + len(inputs), device=inputs.device))
                at += len(inputs)
                yield inputs[keep], targets[keep]

        return TokenBatches(pieces, ranks=self.ranks)
