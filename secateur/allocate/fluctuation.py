"""FLAP's allocation: one threshold over all blocks' standardised fluctuations."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.allocate.base import Evidence, ShareAllocator
from secateur.calibration.needs import MOMENTS, BlockStatistics, Need
from secateur.calibration.statistics import Moments
from secateur.models.block import Block
from secateur.models.parts import AxisView
from secateur.structure.costs import Prices
from secateur.structure.units import Unit
from secateur.utils.errors import InputError


def fluctuations(axis: AxisView, statistics: BlockStatistics) -> Tensor:
    """Var(x_j) ‖W_j‖² of what a matrix reads: (channels, 1), or (KV heads, coordinates of each)."""
    rows = axis.read()
    moments = statistics[MOMENTS[axis.kind]]
    assert isinstance(moments, Moments)
    found: Tensor = moments.variance.view(rows.shape[:2]) * rows.square().sum(2)
    return found


@dataclass(frozen=True)
class Fluctuation(ShareAllocator):
    """Sizes from FLAP's global threshold on fluctuations, for any method.

    Channels' fluctuations, and coordinates' squared ones averaged over a KV head, are standardised
    in every block,

        z = (s − mean s) / std s

    and the largest z of all blocks are kept, up to the budget. Don't use it if losses can be
    measured: equal values of z in different blocks do not mean equal losses.

    Source: arXiv 2312.11983, section 3.3.
    """

    name: ClassVar[str] = "fluctuation"
    summary: ClassVar[str] = "one threshold over the standardized fluctuations of all blocks"
    source: ClassVar[str] = "arXiv 2312.11983"
    needs: ClassVar[frozenset[Need]] = frozenset(MOMENTS.values())

    @property
    def reading(self) -> str:
        """Standardised scores."""
        return "fluctuations"

    def read(self, block: Block, statistics: BlockStatistics) -> tuple[float, ...]:
        """z of the KV heads, then of the channels."""
        mlp, heads = block.mlp.axis("mlp"), [mixer.axis("heads") for mixer in block.mixers]
        found = [standardised(fluctuations(h, statistics).square()).mean(1) for h in heads]
        found.append(standardised(fluctuations(mlp, statistics)).squeeze(1))
        return tuple(torch.cat(found).tolist())

    def check_units(self, units: Sequence[Unit]) -> None:
        """Refuse units that are not of channels and heads, too."""
        super().check_units(units)
        channels = {unit.block for unit in units if unit.kind == "mlp" and not unit.fixed}
        for unit in units:
            if unit.block not in channels:
                raise InputError(
                    f"allocator {self.name!r} compares channels of MLPs with heads, and block "
                    f"{unit.block} has no channels that may go here; leave the allocator out, or "
                    f"choose 'uniform'."
                )

    def shares(
        self, units: Sequence[Unit], evidence: Evidence, prices: Prices, keep: float
    ) -> dict[str, float]:
        """The share of channels, or of KV heads, above the threshold."""
        blocks, owners, scores, weights = len(evidence.readings), [], [], []
        whole = {(u.block, u.kind == "mlp"): 0 for u in units}
        for unit in units:
            whole[unit.block, unit.kind == "mlp"] += prices.of(unit, unit.size)
        mlps = {unit.block: unit.size for unit in units if unit.kind == "mlp"}
        for block in range(blocks):
            reading = evidence.readings[block]
            heads = len(reading) - mlps[block]
            for position, z in enumerate(reading):
                mlp = position >= heads
                owners.append((block, mlp))
                scores.append(z)
                weights.append(whole.get((block, mlp), 0) / (mlps[block] if mlp else heads))
        order = torch.tensor(scores, dtype=torch.float64).argsort(descending=True, stable=True)
        spent = torch.tensor(weights, dtype=torch.float64)[order].cumsum(0)
        kept = order[spent <= keep * float(spent[-1]) * (1 + 1e-12)].tolist()
        share = dict.fromkeys(whole, 0.0)
        counts = {owner: owners.count(owner) for owner in share}
        for owner in (owners[index] for index in kept if owners[index] in share):
            share[owner] += 1 / counts[owner]
        return {unit.name: share[unit.block, unit.kind == "mlp"] for unit in units}


def standardised(scores: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1; nothing but zeros where all are equal."""
    spread = scores.std(correction=1) if scores.numel() > 1 else scores.new_zeros(())
    centred = scores - scores.mean()
    return centred / spread if float(spread) > 0 else torch.zeros_like(centred)
