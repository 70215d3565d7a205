"""NIRVANA's allocation: one threshold for all channels and one for all heads, coupled by γ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.allocate.base import Evidence, ShareAllocator
from secateur.calibration.gradients import LOGITS
from secateur.calibration.needs import BlockStatistics, Need
from secateur.models.block import Block
from secateur.structure.costs import Prices
from secateur.structure.units import Unit
from secateur.utils.options import option


@dataclass(frozen=True)
class TwoThresholds(ShareAllocator):
    """Sizes from two global thresholds on NIRVANA's saliency, for any method.

    A fraction p_m of all channels and a fraction p_a of all KV heads are removed, those with the
    smallest saliency in the whole model. With P_m and P_a the costs of all MLPs and attentions,

        p_m = γ p_a,   p_m P_m + p_a P_a = (1 − keep) (P_m + P_a)

    Every block keeps at least one head and the smallest MLP size. If one fraction reaches its
    maximum, the other takes the rest. The last unit at a threshold can be removed in part, so that
    the budget is met exactly before sizes are rounded. Don't use it if losses can be measured: γ
    was tuned on Llama models.

    Source: arXiv 2509.14230, and its published code for γ and the counts.

    Attributes:
        gamma: γ; the published one for 8 billion parameters.
    """

    gamma: float = option(
        3.36, "fraction of channels removed, relative to the fraction of heads", 0.0
    )

    name: ClassVar[str] = "nirvana"
    summary: ClassVar[str] = (
        "one threshold for all channels and one for all heads, at a fixed ratio"
    )
    source: ClassVar[str] = "arXiv 2509.14230"
    needs: ClassVar[frozenset[Need]] = frozenset(LOGITS.values())

    @property
    def reading(self) -> str:
        """Saliencies."""
        return "logit saliencies"

    def read(self, block: Block, statistics: BlockStatistics) -> tuple[float, ...]:
        """The number of KV heads, their saliencies, then those of the channels."""
        heads, channels = (statistics[LOGITS[kind]].mean[0] for kind in ("heads", "mlp"))
        return (float(len(heads)), *heads.tolist(), *channels.tolist())

    def shares(
        self, units: Sequence[Unit], evidence: Evidence, prices: Prices, keep: float
    ) -> dict[str, float]:
        """The share of channels, or of KV heads, that stay in the unit's block."""
        price, left = {True: 0, False: 0}, {True: dict[int, Tensor](), False: dict[int, Tensor]()}
        for unit in units:
            mlp, reading = unit.kind == "mlp", evidence.readings[unit.block]
            count = 1 + int(reading[0])
            least = self.choices(unit)[0] if unit.kind in ("mlp", "heads") else 1
            own = reading[count:] if mlp else reading[1:count]
            left[mlp][unit.block] = _removable(own, least)
            price[mlp] += prices.of(unit, unit.size)
        p_m, p_a = self.fractions(
            price[True], price[False], keep, _most(left[True]), _most(left[False])
        )
        kept = {True: _above(left[True], p_m), False: _above(left[False], p_a)}
        return {unit.name: kept[unit.kind == "mlp"][unit.block] for unit in units}

    def fractions(
        self, mlp: float, attention: float, keep: float, most_m: float = 1.0, most_a: float = 1.0
    ) -> tuple[float, float]:
        """p_m and p_a from the prices of both and the most that can go of either."""
        gone = (1 - keep) * (mlp + attention)
        if mlp + attention == 0:  # what costs nothing stays
            return 0.0, 0.0
        if mlp == 0:
            return 0.0, min(most_a, gone / attention)
        if attention == 0:
            return min(most_m, gone / mlp), 0.0
        p_m = min(most_m, self.gamma * gone / (attention + self.gamma * mlp))
        p_a = min(most_a, (gone - p_m * mlp) / attention)
        return min(most_m, (gone - p_a * attention) / mlp), p_a


def _removable(saliencies: Sequence[float], least: int) -> Tensor:
    """Saliencies of a block, infinite for the ``least`` largest, which stay."""
    found = torch.tensor(saliencies, dtype=torch.float64)
    found[found.topk(min(least, len(found))).indices] = torch.inf
    return found


def _most(blocks: Mapping[int, Tensor]) -> float:
    """The fraction that can go."""
    return float(torch.cat([*blocks.values()]).isfinite().double().mean()) if blocks else 0.0


def _above(blocks: Mapping[int, Tensor], fraction: float) -> dict[int, float]:
    """The share of each block that stays when ``fraction`` of all goes, least first."""
    if not blocks:
        return {}
    every = torch.cat([*blocks.values()])
    rank = torch.empty_like(every)
    rank[every.argsort(stable=True)] = torch.arange(len(every), dtype=every.dtype)
    stays = (rank + 1 - fraction * len(every)).clamp(0, 1)
    parts = stays.split([len(block) for block in blocks.values()])
    return {block: float(part.mean()) for block, part in zip(blocks, parts, strict=True)}
