"""The default: every unit by its best local solver, each block behind the narrowed ones before."""

from dataclasses import dataclass
from typing import ClassVar

from secateur.allocate.base import Allocator
from secateur.allocate.knapsack import Knapsack
from secateur.calibration.needs import BlockStatistics, Need, Needs
from secateur.calibration.token_batches import TokenBatches
from secateur.methods.base import SequentialMethod, Solution
from secateur.methods.exact_pairs import ExactPairs
from secateur.methods.gauss_newton import GaussNewton
from secateur.methods.joint_obs import JointOBS
from secateur.methods.mixed_svd import MixedSVD
from secateur.models.block import Block
from secateur.structure.units import MLP, QueryKey, Unit
from secateur.utils.options import option


@dataclass(frozen=True)
class Auto(SequentialMethod):
    """Prune channels, query/key and value dimensions under one budget, and refit block by block.

    MLP channels are pruned by the joint optimal brain surgeon, rotary pairs by the exact error of
    the attention output, and values by an SVD of the inputs to the output projection. Then, block
    after block, from the compressed model's activations x to the dense model's outputs y,

        W_O ← argmin E‖x₁ + zW_O − y₁‖²,   W_down ← argmin E‖x₂ + hW_down − y₂‖²

    (1: after the attention, 2: after the block), and gate and up are adjusted by a Gauss-Newton
    step on the second. There are no gradients through the model and no fine-tuning. Don't use it
    with less than about 10,000 calibration tokens: everything is fitted to them.

    Source: own composition; the parts name theirs.
    """

    ridge: float = option(
        1e-4, "ridge of all least-squares problems, relative to the mean diagonal", 0.0
    )
    iterations: int = option(
        3, "conjugate-gradient iterations of the Gauss-Newton step per pruned MLP; 0 for no step", 0
    )

    name: ClassVar[str] = "auto"
    summary: ClassVar[str] = (
        "prunes MLP channels, query/key and value dimensions; refits block by block"
    )
    source: ClassVar[str] = "own; ZipLM, MoDeGPT, SparseLLM-style propagation"
    needs: ClassVar[frozenset[Need]] = frozenset(
        {Needs.HIDDEN_GRAM, Needs.MIXED_GRAM, Needs.PAIR_SCORES}
    )
    selects: ClassVar[tuple[str, ...]] = ("mlp", "query_key")

    @property
    def allocator(self) -> Allocator:
        """One budget by measured losses."""
        return Knapsack()

    def solve(self, unit: Unit, block: Block, statistics: BlockStatistics) -> Solution:
        """The solver of the unit's kind."""
        if isinstance(unit, MLP):
            local: JointOBS | ExactPairs | MixedSVD = JointOBS(self.ridge)
        elif isinstance(unit, QueryKey):
            local = ExactPairs(self.ridge)
        else:
            local = MixedSVD(self.ridge)
        return local.solve(unit, block, statistics)

    def refine(self, block: Block, rows: TokenBatches) -> None:
        """A Gauss-Newton step on the MLP."""
        if self.iterations:
            GaussNewton(self.iterations, 1e-3, self.ridge).refine(block, rows)
