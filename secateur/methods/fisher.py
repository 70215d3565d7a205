"""Fisher masks: channels and heads searched together by how the loss depends on their mask."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from secateur.allocate.knapsack import Knapsack
from secateur.calibration.mask_gradients import FISHER, mask_gradients
from secateur.calibration.needs import GRAMS, BlockStatistics, Need
from secateur.linalg.least_squares import damped, tails
from secateur.methods.base import Solution
from secateur.methods.fitted import FitData, FittedMethod
from secateur.methods.refitted import RefittedMethod, narrowing, problem, refitted
from secateur.models.block import Block
from secateur.structure.costs import Prices
from secateur.structure.error_curve import Curve
from secateur.structure.narrowing import Narrowing
from secateur.structure.selection import Selection
from secateur.structure.units import Unit
from secateur.utils.options import option

if TYPE_CHECKING:
    from secateur.models.model import Model


@dataclass(frozen=True)
class FisherMask(FittedMethod, RefittedMethod):
    """One mask over all channels and KV heads that changes the loss least, found without training.

    With g = ∂L/∂m of a window's mean loss by a mask m of ones, one number a channel or KV head, and
    F = E g gᵀ over windows, the loss changes by ½ (1 − m)ᵀ F (1 − m). First F is taken as diagonal:
    the units with the least Σ_{gone} F_ii within the budget, by dynamic programming over all of
    them. Then, at these sizes, kept and removed ones of each unit are exchanged as long as

        Σ_{i, j gone} F'_ij,   F' = (1 − shrink) F + shrink · diag F

    falls; by default it is left out, as with few windows F beside its diagonal is mostly noise.
    What reads the kept ones is refitted as in ZipLM, in place of the published scaling of
    masks. Don't use it where a backward pass does not fit in memory, or with fewer windows than
    some 32: F is estimated from one gradient a window.

    Source: Kwon et al., "A Fast Post-Training Pruning Framework for Transformers", arXiv
    2204.09656, sections 4.1 and 4.2.
    """

    shrink: float = option(
        1.0, "weight of the diagonal in F when masks are rearranged; 1 leaves that out", 0.0, 1.0
    )
    refit: int = option(1, "1 refits what reads the kept channels and heads, 0 does not", 0, 1)

    name: ClassVar[str] = "fisher"
    summary: ClassVar[str] = "one mask over channels and heads by the loss's Fisher matrix"
    source: ClassVar[str] = "arXiv 2204.09656"
    curve: ClassVar[str] = "lost Fisher score: share of the unit's summed scores that goes"
    needs: ClassVar[frozenset[Need]] = frozenset((*GRAMS.values(), *FISHER.values()))

    def solve(self, unit: Unit, block: Block, statistics: BlockStatistics) -> Solution:
        """By size alone the channels or heads of the largest F_ii stay."""
        gram, weight, width = problem(unit, block, statistics)
        hessian = damped(gram, self.ridge)
        scores = statistics[FISHER[unit.kind]].mean
        order = torch.sort(scores, descending=True, stable=True).indices

        def choose(size: int) -> Tensor:
            return torch.sort(order[:size]).values

        def keeping(keep: Tensor) -> Narrowing:
            rows = refitted(hessian, weight, keep, width, unit.name) if self.refit else None
            return narrowing(unit, block, keep, rows)

        return Solution.of(Curve.of(tails(scores[order])), choose, keeping)

    def fit(
        self,
        model: "Model",
        units: Sequence[Unit],
        costs: Prices,
        budget: int,
        data: FitData,
    ) -> Selection:
        """Search the mask with a diagonal F, then rearrange it inside each unit."""
        found = mask_gradients(model, data.tokens, FISHER.values())
        rows = {u.name: found[u.block, FISHER[u.kind].site.at(u.part)] for u in units}
        orders, losses = {}, {}
        for unit in units:
            scores = rows[unit.name].square().mean(0)
            orders[unit.name] = torch.sort(scores, descending=True, stable=True).indices
            losses[unit.name] = Curve(tuple(tails(scores[orders[unit.name]]).tolist()))
        whole = [replace(u, least=max(u.least, u.sizes()[1])) if u.least == 0 else u for u in units]
        sizes = Knapsack().within(whole, losses, costs, budget)
        return Selection(
            {
                unit.name: rearranged(
                    rows[unit.name], orders[unit.name][: sizes[unit.name]], self.shrink
                )
                for unit in units
                if sizes[unit.name] < unit.size
            }
        )


def rearranged(gradients: Tensor, keep: Tensor, shrink: float) -> Tensor:
    """Exchange kept and removed ones while Σ_{i, j gone} F'_ij falls; what stays, ascending.

    ``gradients`` are (windows, size), F is their mean outer product and F' what ``shrink`` makes of
    it. Each removed one in turn, largest score first, changes places with the kept one that
    lowers the sum most, until a round changes nothing. F itself, (size, size), is never made.
    """
    size = gradients.shape[1]
    scores = gradients.square().sum(0)
    gone = torch.ones(size, dtype=torch.bool)
    gone[keep] = False
    lost = gradients[:, gone].sum(1)
    cross = 1 - shrink
    moved = cross > 0 and 0 < int(gone.sum()) < size
    while moved:
        moved = False
        for out in sorted(gone.nonzero().flatten().tolist(), key=lambda i: -float(scores[i])):
            rest = lost - gradients[:, out]
            change = 2 * cross * (gradients.mT @ rest) + scores
            change = torch.where(gone, torch.inf, change - change[out])
            best = int(change.argmin())
            if float(change[best]) < -1e-9 * float(scores[out] + scores[best]):
                gone[out], gone[best] = False, True
                lost, moved = rest + gradients[:, best], True
    return (~gone).nonzero().flatten()
