"""CFSP: MLP channels by activation and relative weight, blocks by the angle that they turn."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.allocate.angular import Angular
from secateur.allocate.base import Allocator
from secateur.calibration.needs import BlockStatistics, Need, Needs
from secateur.methods.scored import ScoredMethod
from secateur.models.block import Block
from secateur.structure.units import Unit
from secateur.utils.options import option


@dataclass(frozen=True)
class CFSP(ScoredMethod):
    """Prune MLP channels by activation norm times share of the weights; attention is unchanged.

    With x the channels as W_down reads them, D = W_down and U, G what makes them,

        s_j = ‖x_j‖ · mean_i (share_D + share_U + share_G)
        share_D = |D_ji| ‖x_j‖ / Σ |D_ji| ‖x_j‖,   share_U = |U_ij| / Σ |U_ij|,   share_G likewise

    where i runs over the hidden dims and Σ over the channels, which compete. ``within`` takes Σ
    over a channel's own weights, as the released code does: all shares then average to the same
    number, and s_j is the activation norm and nothing else. Blocks share the budget by
    :class:`Angular`. Don't use it below about 0.8: ``keep`` counts attention, which is not
    pruned, so the MLPs lose all the more.

    Source: Wang et al., "CFSP", arXiv 2409.13199 (COLING 2025); sums as repaired here.
    """

    within: int = option(0, "1 normalizes within each channel, as the released code does", 0, 1)

    name: ClassVar[str] = "cfsp"
    summary: ClassVar[str] = "prunes MLP channels by activation norm times share of the weights"
    source: ClassVar[str] = "arXiv 2409.13199"
    curve: ClassVar[str] = "lost energy: share of the channels' summed energies that goes"
    kinds: ClassVar[tuple[str, ...]] = ("mlp",)
    spared: ClassVar[tuple[str, ...]] = ("heads",)
    needs: ClassVar[frozenset[Need]] = frozenset({Needs.HIDDEN_ENERGY})

    @property
    def allocator(self) -> Allocator:
        """The published allocation."""
        return Angular()

    def scores(self, unit: Unit, block: Block, statistics: BlockStatistics) -> Tensor:
        """Norm times mean share."""
        norms = statistics[Needs.HIDDEN_ENERGY].mean.sqrt()
        mlp = block.mlp_of(unit)
        read = mlp.consumer_weight.abs() * norms.unsqueeze(1)  # channels, hidden
        weights = [read, *(made.double().abs().t() for made in mlp.producer_weights)]
        scores: Tensor = norms * sum(self._shares(w).mean(1) for w in weights)
        return scores

    def _shares(self, weights: Tensor) -> Tensor:
        whole = weights.sum(1 if self.within else 0, keepdim=True)
        return weights / torch.where(whole > 0, whole, 1.0)

    def errors(self, unit: Unit, block: Block, statistics: BlockStatistics) -> Tensor:
        """The energy that a channel adds to the output."""
        energy: Tensor = statistics[Needs.HIDDEN_ENERGY].mean
        return energy * block.mlp_of(unit).consumer_weight.square().sum(1)
