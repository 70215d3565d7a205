"""LLM-Pruner: pruning of channels and KV heads by a Taylor expansion of the loss."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.allocate.base import Allocator
from secateur.allocate.middle import Middle
from secateur.calibration.gradients import CURVED_LOSS, LOSS
from secateur.calibration.needs import BlockStatistics, Need
from secateur.methods.scored import ScoredMethod
from secateur.models.block import Block
from secateur.structure.units import Unit
from secateur.utils.errors import InputError, nearest, shown
from secateur.utils.options import option

#: the form of the score → the row of the statistic
FORMS = {"element": 0, "vector": 1, "second": 2, "mix": 3}


@dataclass(frozen=True)
class LLMPruner(ScoredMethod):
    """Prune channels and KV heads by a Taylor expansion of the loss over all their parameters.

    With w the parameters of a channel or KV head (its query heads' too), g the gradient of the mean
    next-token loss and F = E g² over windows, ``taylor`` chooses

        element   Σ |g∘w|
        vector    |Σ g∘w|
        second    Σ ½ w² F
        mix       Σ |g∘w − ½ w² F|

    Don't use it if a backward pass does not fit into memory, or below about 0.8 without fine-tuning
    afterwards: the remaining weights are not refitted.

    Source: Ma et al., "LLM-Pruner: On the Structural Pruning of Large Language Models", arXiv
    2305.11627, section 3.2; summation over the group.
    """

    taylor: str = option("element", "Taylor score: element, vector, second or mix")

    name: ClassVar[str] = "llm-pruner"
    summary: ClassVar[str] = "prunes channels and heads by a Taylor expansion of the loss"
    source: ClassVar[str] = "arXiv 2305.11627"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.taylor not in FORMS:
            known = nearest(self.taylor, FORMS)
            raise InputError(f"unknown --taylor {shown(self.taylor)}. {known}")

    @property
    def needs(self) -> frozenset[Need]:
        """Gradients, and their squares only where they are asked for, as these are dearer."""
        return frozenset(self._loss.values())

    @property
    def _loss(self) -> dict[str, Need]:
        return CURVED_LOSS if self.taylor in ("second", "mix") else LOSS

    @property
    def allocator(self) -> Allocator:
        """One ratio for the blocks in the middle."""
        return Middle()

    def scores(self, unit: Unit, block: Block, statistics: BlockStatistics) -> Tensor:
        """What the loss loses, as far as the form tells."""
        return statistics[self._loss[unit.kind]].mean[FORMS[self.taylor]].abs()
