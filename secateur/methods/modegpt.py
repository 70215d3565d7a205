"""MoDeGPT: one decomposition per kind of module, and one budget over the blocks."""

from dataclasses import dataclass
from typing import ClassVar

from secateur.allocate.base import Allocator
from secateur.allocate.influence import EntropicInfluence
from secateur.calibration.needs import BlockStatistics, Need, Needs
from secateur.methods.base import Method, Solution
from secateur.methods.cr import CR
from secateur.methods.head_svd import HeadSVD
from secateur.methods.nystrom import Nystrom
from secateur.models.block import Block
from secateur.structure.units import MLP, QueryKey, Unit
from secateur.utils.options import option


@dataclass(frozen=True)
class MoDeGPT(Method):
    """Modular decomposition as published: Nyström, CR and SVD with one share per block.

    It needs no gradients and no fine-tuning, and collects all statistics of the dense model in one
    pass. Don't use it if the units of a block differ much in sensitivity: they share one ratio.

    Source: Lin et al., "MoDeGPT: Modular Decomposition for Large Language Model Compression",
    arXiv 2408.09632 (ICLR 2025).
    """

    leverage_ridge: float = option(1e-3, "ridge of the MLP channel scores", 0.0)
    refit_ridge: float = option(1e-6, "ridge of the MLP least squares", 0.0)
    value_ridge: float = option(1e-6, "ridge of the value Gram", 0.0)

    name: ClassVar[str] = "modegpt"
    summary: ClassVar[str] = (
        "Nyström for the MLP, CR for queries and keys, SVD for values and output"
    )
    source: ClassVar[str] = "arXiv 2408.09632"
    needs: ClassVar[frozenset[Need]] = frozenset(
        {Needs.HIDDEN_GRAM, Needs.QUERY_ENERGY, Needs.KEY_ENERGY, Needs.VALUE_GRAM}
    )

    @property
    def allocator(self) -> Allocator:
        """The published allocation."""
        return EntropicInfluence()

    def solve(self, unit: Unit, block: Block, statistics: BlockStatistics) -> Solution:
        """The unit's own decomposition."""
        if isinstance(unit, MLP):
            local: Nystrom | CR | HeadSVD = Nystrom(self.leverage_ridge, self.refit_ridge)
        elif isinstance(unit, QueryKey):
            local = CR()
        else:
            local = HeadSVD(self.value_ridge)
        return local.solve(unit, block, statistics)
