"""CFSP's allocation: blocks that rotate the residual stream more are pruned less."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from secateur.allocate.base import BlockAllocator
from secateur.calibration.needs import BlockStatistics, Need, Needs
from secateur.models.block import Block
from secateur.utils.options import option

MARGIN = 1.05  #: how far below 1 the largest share of a contracted allocation stays, as published


@dataclass(frozen=True)
class Angular(BlockAllocator):
    """Give each block a share that is a sigmoid of the angle between its input and output.

    With s_l the mean over tokens of arccos(cos(x, y)) / π between a block's input and output, and
    m the mean by price,

        g_l = σ(slope · (s_l − mean s)),   share_l = keep · g_l / m

    If the largest share would reach 1, all shares move towards the mean, g_l ← m + t (g_l − m),
    until it is below 1; the mean remains exactly ``keep``. The published score is a sum over tokens
    divided by 10⁴. With the published 128 × 2048 tokens this is a slope of 26.2; with another
    amount of text it would be a different allocation. Don't use it if the units of a block differ
    in how sensitive they are.

    Source: Wang et al., "CFSP", arXiv 2409.13199 (COLING 2025); its code for the constants.
    """

    slope: float = option(26.2, "slope of the sigmoid over angles; 0 is uniform", 0.0)

    name: ClassVar[str] = "angular"
    summary: ClassVar[str] = "one share per block, larger if the block rotates its input more"
    source: ClassVar[str] = "arXiv 2409.13199"
    needs: ClassVar[frozenset[Need]] = frozenset({Needs.ANGLE})

    @property
    def reading(self) -> str:
        """The mean angle."""
        return "angle"

    def read(self, block: Block, statistics: BlockStatistics) -> tuple[float, ...]:
        """The angle between input and output, as a share of π."""
        return (float(statistics[Needs.ANGLE].mean),)

    def of_blocks(
        self, values: Sequence[float], weights: Sequence[float], keep: float
    ) -> list[float]:
        """Shares of which the mean by ``weights`` is ``keep`` and the largest at most 1."""
        middle, whole = math.fsum(values) / len(values), sum(weights)
        if not whole:
            return [keep] * len(values)
        grades = [0.5 * (1 + math.tanh(0.5 * self.slope * (s - middle))) for s in values]
        mean = math.fsum(w * g for w, g in zip(weights, grades, strict=True)) / whole
        away = [g / mean - 1 for g in grades]
        furthest = max(a for a, w in zip(away, weights, strict=True) if w)
        draw = 1.0
        if furthest > 0 and keep * (1 + furthest) >= 1:
            draw = (1 / keep - 1) / MARGIN / furthest
        return [keep * (1 + draw * a) for a in away]
