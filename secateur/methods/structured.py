"""Products of two block-diagonal maps with permutations between, nearest to a weight."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from secateur.layers.factored_secateur import Spec
from secateur.layers.forms_secateur import fill
from secateur.layers.structured_secateur import Monarch
from secateur.linalg.least_squares import least_squares
from secateur.methods.form import FormMethod, Metric
from secateur.structure.form import Form
from secateur.structure.parametrizations import form_of
from secateur.structure.units import Matrix, Unit
from secateur.utils.options import option

if TYPE_CHECKING:
    from secateur.models.model import Model

MOST_RANKS = 32
Slices = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class StructuredMethod(FormMethod):
    """Cuts a weight into slices, one for a block of outputs l and one of inputs k.

    In such a product every slice W_lk is free to be any matrix of some rank ρ and meets no other.
    With H_kk = L_k L_kᵀ, the block of H of the inputs of a slice,

        W_lk L_k = Σ_t σ_t u_t v_tᵀ,   first_k ∋ √σ_t v_tᵀ L_k⁻¹,   second_l ∋ √σ_t u_t,   t ≤ ρ

    is nearest if inputs of two blocks have nothing to do with each other; the error is then
    Σ_{t>ρ} σ_t². What they have in common is seen to afterwards: with R_l the rows of first that
    second_l reads, second_l ← W_l H R_lᵀ (R_l H R_lᵀ)⁻¹.
    """

    ridge: float = option(1e-6, "ridge of H, relative to its mean diagonal", 0.0)
    refit: int = option(1, "1 refits the second factor to the whole H, 0 does not", 0, 1)

    rereads: ClassVar[bool] = True
    layers: ClassVar[type[Monarch]]

    @abstractmethod
    def specs(self, outputs: int, inputs: int) -> Sequence[tuple[dict[str, int], str]]:
        """The numbers of every form that it may make of a matrix, and what to call it."""

    def forms(self, outputs: int, inputs: int, bias: bool) -> Sequence[Form]:
        """Those whose layer has nothing against it."""
        common = {"form": self.layers.form, "outputs": outputs, "inputs": inputs, "bias": bias}
        named: list[tuple[Spec, str]] = [
            ({**common, **numbers}, label) for numbers, label in self.specs(outputs, inputs)
        ]
        return [form_of(spec, of) for spec, of in named if self.layers.problem(spec) is None]

    def reshaped(self, weight: Tensor, metric: Metric, form: Form) -> dict[str, Tensor]:
        """The two factors."""
        before, behind, _ = self.layers.blocks(dict(form.spec))
        return self.factors(weight, metric, form, sliced(weight, metric, before, behind))

    def factors(
        self, weight: Tensor, metric: Metric, form: Form, slices: Slices
    ) -> dict[str, Tensor]:
        """Both factors, from the singular values of all slices."""
        left, values, right = slices  # (out_blocks, in_blocks, …)
        before, behind, middle = self.layers.blocks(dict(form.spec))
        place = torch.arange(before * middle, device=weight.device)
        source, target = place // middle, place % behind  # as the layer's shuffle has it
        rank = place % middle // behind
        share = values[target, source, rank].sqrt().unsqueeze(1)
        first = share * right[target, source, rank]
        second = share * left[target, source, :, rank]
        second = second.unflatten(0, (-1, behind)).permute(1, 2, 0)
        if self.refit:
            rows = first.new_zeros(len(place), before, first.shape[1])
            rows[place, source] = first
            second = refitted(weight, metric, rows.flatten(1), second)
        return {"first": first.unflatten(0, (before, middle)), "second": second}

    def errors(
        self, weight: Tensor, metric: Metric, forms: Sequence[Form], judged: Metric | None = None
    ) -> list[float]:
        """The output error of every form; slices are decomposed once for all ranks."""
        known: dict[tuple[int, int], Slices] = {}
        found = []
        for form in forms:
            before, behind, _ = self.layers.blocks(dict(form.spec))
            if (before, behind) not in known:
                known[before, behind] = sliced(weight, metric, before, behind)
            tensors = self.factors(weight, metric, form, known[before, behind])
            layer = fill({**form.spec, "bias": False}, tensors, None, torch.float64)
            found.append((judged or metric).error(weight - layer.dense()))
        return found


def sliced(weight: Tensor, metric: Metric, before: int, behind: int) -> Slices:
    """Singular vectors and values of W_lk L_k, the right ones times L_k⁻¹."""
    parts = [
        Metric(block).whitening
        for block in metric.damped.unflatten(0, (before, -1))
        .unflatten(2, (before, -1))
        .diagonal(dim1=0, dim2=2)
        .movedim(2, 0)
    ]
    roots = torch.stack([root for root, _ in parts])
    inverses = torch.stack([inverse for _, inverse in parts])
    slices = weight.unflatten(0, (-1, behind)).unflatten(2, (before, -1)).permute(1, 2, 0, 3)
    left, values, right = torch.linalg.svd(slices @ roots, full_matrices=False)
    return left, values, right @ inverses


def refitted(weight: Tensor, metric: Metric, rows: Tensor, second: Tensor) -> Tensor:
    """The second factor that is best for the whole of H, behind a given first one.

    A ridge pulls it to what it was, so that it loses nothing.
    """
    behind, found = len(second), []
    for index in range(behind):
        read, own = rows[index::behind], weight[index::behind]
        toward = metric.gram @ read.mT
        fit = least_squares(read @ toward, (own @ toward).mT, second[index].mT, metric.ridge)
        found.append(fit.mT)
    return torch.stack(found)


@dataclass(frozen=True)
class RankedBlocks(StructuredMethod):
    """One of these with a number of blocks for all matrices, and ranks to choose from."""

    blocks: int = option(4, "number of blocks of inputs, and of outputs for monarch", 1)
    rank_step: int = option(2, "ranks are multiples of this number; at most 32 ranks are tried", 1)

    cuts_outputs: ClassVar[bool]

    @abstractmethod
    def most(self, outputs: int, inputs: int) -> int:
        """The largest rank of a slice that is smaller than the dense weight."""

    @abstractmethod
    def of_rank(self, rank: int) -> tuple[dict[str, int], str]:
        """The numbers of a form of this rank, and what to call it."""

    def specs(self, outputs: int, inputs: int) -> Sequence[tuple[dict[str, int], str]]:
        """Ranks below the break-even, evenly spaced: each of them is refitted for its error."""
        most = self.most(outputs, inputs)
        step = self.rank_step * max(1, math.ceil(most / (MOST_RANKS * self.rank_step)))
        return [self.of_rank(rank) for rank in range(step, most + 1, step)]

    def obstacle(self, model: "Model") -> str | None:
        """Say which numbers would do."""
        found = super().obstacle(model)
        if found is None:
            return None
        units = [unit for unit in self.units(model, 1) if isinstance(unit, Matrix)]
        most = max((self.most(unit.outputs, unit.inputs) for unit in units), default=0)
        if 0 < most < self.rank_step:
            return (
                f"rank_step {self.rank_step} is above the largest rank that takes fewer bytes than "
                f"a matrix, {most}; try --rank-step {most}"
            )
        return undivided(units, self.blocks, self.cuts_outputs) or found


def undivided(units: Sequence[Unit], blocks: int, both: bool) -> str | None:
    """What stands in the way where a number of blocks divides no matrix; None if it divides one."""
    shapes = {(u.outputs, u.inputs) for u in units if isinstance(u, Matrix)}
    sizes = {math.gcd(*shape) if both else shape[1] for shape in shapes}
    if any(size % blocks == 0 for size in sizes):
        return None
    possible = sorted({d for size in sizes for d in range(2, size + 1) if size % d == 0})
    near = min(possible, key=lambda d: (abs(d - blocks), d), default=1)
    what = "outputs and inputs" if both else "the inputs"
    listed = ", ".join(f"{outputs}×{inputs}" for outputs, inputs in sorted(shapes))
    return f"{blocks} blocks don't divide {what} of a matrix ({listed}); try --blocks {near}"
