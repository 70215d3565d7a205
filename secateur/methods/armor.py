"""ARMOR: a 2:4 core between block-diagonal wrappers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from secateur.layers.sparse_secateur import encoded
from secateur.linalg.block_2_4 import descent, norms
from secateur.methods.form import FormMethod, Metric
from secateur.structure.form import Form
from secateur.structure.parametrizations import form_of, smaller
from secateur.structure.units import Matrix
from secateur.utils.errors import InputError
from secateur.utils.options import option

if TYPE_CHECKING:
    from secateur.models.model import Model


@dataclass(frozen=True)
class Armor(FormMethod):
    """Approximate each matrix by a 2:4 sparse matrix between two block-diagonal factors.

    W̄ is W with columns, then rows, divided by their norms. With h_j = E x_j²,

        W̄ ≈ A S B,   ℓ = Σ_ij h_j (W̄ − A S B)²_ij,   A and B block-diagonal, S 2:4

    from A = B = I and in S the two of every four with the largest W̄² h (NoWag-P). Each iteration
    solves A, then B, by least squares, moves S down its gradient as far as it pays, and then, in
    every pair of blocks of A and B, gives one group of S the best of its six supports with the best
    weights, all else fixed. That group is drawn in proportion to |∂ℓ/∂S|. No step raises ℓ, and the
    best state is what stays, so ℓ is at most NoWag-P's; published code takes Adam's steps, which
    may raise it, and keeps the last. The norms are multiplied into A and B. Don't use it
    unless you need a 2:4 kernel: other forms use the bytes and time of the factors better, and
    large matrices take long without a GPU.

    Source: "ARMOR: High-Performance Semi-Structured Pruning via Adaptive Matrix Factorization",
    arXiv 2510.05528, section 3.
    """

    block: int = option(32, "block size of the block-diagonal factors, a multiple of 4", 4, 4096)
    rounds: int = option(300, "iterations", 0)
    draws: int = option(0, "seed of the sampled groups", 0)

    name: ClassVar[str] = "armor"
    summary: ClassVar[str] = "2:4 sparsity between two block-diagonal factors"
    source: ClassVar[str] = "arXiv 2510.05528"
    rereads: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block % 4:
            near = max(4, 4 * round(self.block / 4))
            raise InputError(f"armor: block={self.block} should be a multiple of 4, e.g. {near}.")

    def forms(self, outputs: int, inputs: int, bias: bool) -> Sequence[Form]:
        """One; none where blocks don't divide the matrix."""
        if outputs % self.block or inputs % self.block:
            return []
        spec = {"form": "armor", "outputs": outputs, "inputs": inputs, "bias": bias}
        return [form_of({**spec, "block": self.block}, f"2:4, blocks of {self.block}")]

    def obstacle(self, model: "Model") -> str | None:
        """Its blocks divide no matrix, or make none smaller."""
        if super().obstacle(model) is None:
            return None
        units = [unit for unit in self.units(model, 1) if isinstance(unit, Matrix)]
        shapes = sorted({(unit.outputs, unit.inputs) for unit in units})
        itemsize = model.stored.itemsize

        def serves(block: int) -> bool:
            other = replace(self, block=block)
            return any(smaller(other.forms(*s, False), *s, itemsize) for s in shapes)

        most = max((min(shape) for shape in shapes), default=0)
        able = [block for block in range(4, most + 1, 4) if serves(block)]
        near = min(able, key=lambda block: (abs(block - self.block), block), default=None)
        advice = "no other size does" if near is None else f"the nearest of use is --block {near}"
        sizes = ", ".join(f"{outputs} x {inputs}" for outputs, inputs in shapes)
        return f"blocks of {self.block} make none of its matrices ({sizes}) smaller; {advice}"

    def reshaped(self, weight: Tensor, metric: Metric, form: Form) -> dict[str, Tensor]:
        """The best factors, with the norms in the wrappers."""
        block = form.spec["block"]
        columns = norms(weight, 0)
        rows = norms(weight / columns, 1)
        scaled = weight / columns / rows.unsqueeze(1)
        states = descent(scaled, metric.energy, block, self.rounds, self.draws)
        best, least = next(states)
        for state, loss in states:
            if loss < least:
                best, least = state, loss
        mask = best.mask.flatten(2).flatten(0, 1)
        return {
            "left": best.left * rows.view(-1, block, 1),
            "right": best.right * columns.view(-1, 1, block),
            "values": best.core.flatten(2).flatten(0, 1)[mask].view(len(mask), -1),
            "codes": encoded(mask, 2, 4),
        }
