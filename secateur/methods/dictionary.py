"""Weights as a dictionary times a sparse code: what the methods with that form share."""

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from secateur.layers.factored_secateur import Factored, Spec
from secateur.layers.forms_secateur import fill
from secateur.layers.structured_secateur import MOST_ATOMS, Codes, Dictionary
from secateur.methods.form import FormMethod, Metric, stacked
from secateur.models.block import Block, Linear
from secateur.structure.form import Form
from secateur.structure.parametrizations import form_of
from secateur.utils.options import option

if TYPE_CHECKING:
    from secateur.models.model import Model

ITEMSIZE = 2  # of a number when sizes are set out; what is paid is counted with the model's own


@dataclass(frozen=True)
class DictionaryMethod(FormMethod):
    """Writes each row of a weight as a sparse combination of shared rows, the atoms.

    With L Lᵀ = H, rows are y = w L, so that plain least squares is what the layer's outputs lose:

        ‖(W − C A)L‖² = ‖Y − C (A L)‖²,   s non-zeros in every row of C,   k = ratio · s atoms

    Sizes are evenly spaced in bytes, with as many atoms as they pay for. Each has to be solved by
    itself, for the curve as when it is applied. With ``share``, W are the weights of several layers
    that read the same x, one below the other, so the metric is exact for each of them.
    """

    ridge: float = option(1e-6, "ridge of H, relative to its mean diagonal", 0.0)
    ratio: float = option(2.0, "number of atoms per nonzero of a row", 1.0)
    grain: int = option(8, "sizes are multiples of 1 / grain of the bytes", 2, 4096)
    sweeps: int = option(10, "iterations of the solver", 1)
    share: int = option(0, "1 for one dictionary for all layers with the same input", 0, 1)

    rereads: ClassVar[bool] = True

    @property
    def parts(self) -> int:
        """Blocks of inputs, each with a dictionary."""
        return 1

    def forms(self, outputs: int, inputs: int, bias: bool) -> Sequence[Form]:
        """For every size the most atoms that its bytes pay for."""
        common = {"form": "dictionary", "outputs": outputs, "inputs": inputs, "bias": bias}
        if inputs % self.parts:
            return []
        counts = range(1, min(self.most(outputs, inputs), MOST_ATOMS) + 1)
        budgets = [
            level * outputs * inputs * ITEMSIZE // self.grain for level in range(1, self.grain)
        ]
        within = {
            bisect_right(counts, budget, key=lambda n: self._form(common, n).bytes(ITEMSIZE))
            for budget in budgets
        }
        return [self._form(common, atoms) for atoms in sorted(within - {0})]

    def together(self, block: Block) -> list[list[Linear]]:
        """Those that read the same, where they are to share."""
        alone = super().together(block)
        if not self.share:
            return alone
        found: dict[object, list[Linear]] = {}
        for (linear,) in alone:
            # What is read through another linear, or is one of two factors, has no peers.
            read = linear.path if linear.factor else linear.site
            found.setdefault(read, []).append(linear)
        return [*found.values()]

    def offered(self, group: Sequence[Linear], model: "Model") -> Sequence[Form]:
        """Those whose atoms the largest layer of a group can hold, as its own it would have."""
        largest = max(len(stacked([linear])) for linear in group)
        found = super().offered(group, model)
        return [form for form in found if form.spec["atoms"] <= largest]

    def replacing(
        self, group: Sequence[Linear], weight: Tensor, metric: Metric, form: Form
    ) -> dict[str, nn.Module]:
        """One layer by itself; or the largest with the atoms, and the others with codes alone."""
        if len(group) == 1:
            return super().replacing(group, weight, metric, form)
        codes = self.reshaped(weight, metric, form)
        atoms = {"first": codes.pop("first")}
        leader = max(group, key=lambda linear: len(stacked([linear])))
        found: dict[str, Factored] = {}
        start = 0
        for linear in group:
            own, bias = stacked([linear]), linear.module.bias
            constant = bias if isinstance(bias, Tensor) else None
            spec = {**form.spec, "outputs": len(own), "bias": constant is not None}
            tensors = {name: part[:, start : start + len(own)] for name, part in codes.items()}
            if linear is leader:
                tensors |= atoms
            else:
                spec |= {"form": Codes.form, "of": leader.path}
            found[linear.path] = fill(spec, tensors, constant, own.dtype)
            start += len(own)
        for layer in found.values():
            layer.follow(found)
        return dict(found)

    def most(self, outputs: int, inputs: int) -> int:
        """The most atoms that a block of a matrix can use."""
        nonzeros = inputs // self.parts
        return min(outputs, int(nonzeros * self.ratio))

    def _form(self, common: Spec, atoms: int) -> Form:
        nonzeros = max(1, int(atoms / self.ratio))
        numbers = {"blocks": self.parts, "atoms": atoms, "nonzeros": nonzeros}
        return form_of({**common, **numbers}, f"{nonzeros} of {atoms} atoms")

    def reshaped(self, weight: Tensor, metric: Metric, form: Form) -> dict[str, Tensor]:
        """Atoms, codes and what says which atoms they are for."""
        spec = dict(form.spec)
        root, inverse = metric.whitening
        codes, atoms = self.coded(weight @ root, spec["atoms"], spec["nonzeros"])
        return stored(spec, codes.unsqueeze(0), (atoms @ inverse).unsqueeze(0))

    @abstractmethod
    def coded(self, signals: Tensor, atoms: int, nonzeros: int) -> tuple[Tensor, Tensor]:
        """Codes (rows, atoms) and atoms for whitened rows."""


def stored(spec: Spec, codes: Tensor, atoms: Tensor) -> dict[str, Tensor]:
    """The tensors of codes (blocks, outputs, atoms), of which s in every row say all, and atoms."""
    order = codes.abs().topk(spec["nonzeros"], dim=2).indices  # zeros make up the number
    chosen = torch.zeros_like(codes, dtype=torch.bool).scatter_(2, order, True)
    values = codes[chosen].unflatten(0, (*codes.shape[:2], -1))
    return {"first": atoms, "second": values, **Dictionary.support(spec, chosen)}
