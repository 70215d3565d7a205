"""NIRVANA: pruning of channels and KV heads by gradients of the highest logits."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.allocate.base import Allocator
from secateur.allocate.nirvana import TwoThresholds
from secateur.calibration.gradients import LOGITS
from secateur.calibration.needs import BlockStatistics, Need
from secateur.methods.scored import ScoredMethod
from secateur.models.block import Block
from secateur.structure.units import Unit


@dataclass(frozen=True)
class Nirvana(ScoredMethod):
    """Prune channels and KV heads by the saliency of a functional of the logits, without labels.

    With z the logits over the tokens t of a window and the vocabulary v, w all parameters that go
    with a channel or a KV head, its query heads' among them,

        f = mean over windows and v of max_t z_tv,   s = Σ |w ∘ ∂f/∂w|

    the most that f can lose to first order; the paper derives it from the kernel that training by
    sign steps, as Adam's nearly are, has. Don't use it if a backward pass does not fit into
    memory, or below about 0.8 without fine-tuning: the remaining weights are not refitted.

    Source: Ai et al., "NIRVANA: Structured Pruning Reimagined for Large Language Models
    Compression", arXiv 2509.14230, and its published code for the functional.
    """

    name: ClassVar[str] = "nirvana"
    summary: ClassVar[str] = "prunes channels and heads by gradients of the highest logits"
    source: ClassVar[str] = "arXiv 2509.14230"
    needs: ClassVar[frozenset[Need]] = frozenset(LOGITS.values())

    @property
    def allocator(self) -> Allocator:
        """A threshold for the channels and one for the heads of all blocks."""
        return TwoThresholds()

    def scores(self, unit: Unit, block: Block, statistics: BlockStatistics) -> Tensor:
        """What the functional loses at most, to first order."""
        return statistics[LOGITS[unit.kind]].mean[0]
