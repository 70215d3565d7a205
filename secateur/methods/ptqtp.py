"""PTQTP: a weight as two planes of trits, with two scales a group."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from secateur.layers.factored_secateur import packed_trits
from secateur.linalg.ternary import Found, best_scales, better_of, errors, nearest_trits
from secateur.methods.form import FormMethod, Metric
from secateur.structure.form import Form
from secateur.structure.parametrizations import form_of, nearest_divisors
from secateur.structure.units import Matrix
from secateur.utils.options import option, whole_numbers

if TYPE_CHECKING:
    from secateur.models.model import Model


@dataclass(frozen=True)
class PTQTP(FormMethod):
    """Quantize each group of weights to two ternary planes with a scale each.

        ŵ = a₁ t₁ + a₂ t₂,   t ∈ {−1, 0, 1}

    In turns the scales solve (SᵀS + λI) a = Sᵀw, S = [t₁ t₂], and every weight takes the best of
    the nine pairs, until no scale moves by more than ``epsilon`` times the group's root mean
    square. A turn that does not lower ‖w − ŵ‖² is not taken. λ grows where SᵀS is nearly singular.
    It starts at t₁ = t₂ = sign(w) as in the paper, and at the best of some a₂ / a₁ with
    a₁ + a₂ = max|w|; the better end is kept. Don't use it if 4.125 bits per weight are acceptable:
    ``rtn`` and ``gptq`` with 4 bits lose less, and there are kernels for them. Two packed planes
    take 3.45 bits per weight.

    Source: Xiao et al., "PTQTP: Post-Training Quantization to Trit-Planes for Large Language
    Models", arXiv 2509.16989.
    """

    groups: str = option(
        "128", "group size: inputs that share two scales; several, as in 64,128, to mix"
    )
    turns: int = option(50, "maximum number of iterations", 1)
    epsilon: float = option(1e-4, "relative change of the scales at which iterations end", 0.0)
    ridge: float = option(1e-8, "ridge λ for well-conditioned SᵀS", 1e-12)
    ratios: int = option(
        3, "number of initial ratios of the two scales in addition to the paper's", 0
    )

    name: ClassVar[str] = "ptqtp"
    summary: ClassVar[str] = "quantizes to two ternary planes, from the weights alone"
    source: ClassVar[str] = "arXiv 2509.16989"
    data_aware: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._groups()

    def _groups(self) -> tuple[int, ...]:
        return whole_numbers(self, "groups", 2, 2**20)

    @classmethod
    def among_others(cls) -> "PTQTP":
        """With groups of two sizes."""
        return cls(groups="64,128")

    def forms(self, outputs: int, inputs: int, bias: bool) -> Sequence[Form]:
        """One for each size of groups that divides the inputs."""
        common = {"form": "trits", "outputs": outputs, "inputs": inputs, "bias": bias}
        fitting = [size for size in self._groups() if inputs % size == 0]
        made = [form_of({**common, "group": size}, f"trits/{size}") for size in fitting]
        return [replace(form, parameters=outputs * inputs) for form in made]

    def obstacle(self, model: "Model") -> str | None:
        """Groups that divide no inputs, or no matrix that becomes smaller."""
        inputs = {unit.inputs for unit in self.units(model, 1) if isinstance(unit, Matrix)}
        if all(count % size for count in inputs for size in self._groups()):
            return (
                f"groups of {self.groups} divide the inputs of none of its matrices; nearest are "
                f"{nearest_divisors(inputs, self._groups()[0])}"
            )
        return super().obstacle(model)

    def reshaped(self, weight: Tensor, metric: Metric, form: Form) -> dict[str, Tensor]:
        """Packed trits and their scales."""
        groups = weight.unflatten(1, (-1, form.spec["group"])).flatten(0, 1)
        scales, trits = self.fitted(groups)
        return {
            "codes": packed_trits(trits.view(2, *weight.shape)),
            "scales": scales.view(2, len(weight), -1),
        }

    def fitted(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Scales (2, groups) and trits (2, groups, weights) for weights (groups, weights)."""
        size = groups.square().mean(1).sqrt().clamp_min(1e-200)
        groups = groups / size.unsqueeze(1)
        signs = torch.where(groups >= 0, 1.0, -1.0).to(groups).expand(2, -1, -1)
        found = self.alternated(groups, signs)
        if self.ratios:
            found = better_of(found, self.alternated(groups, self.start(groups)))
        scales, trits, _ = found
        return scales * size, trits

    def start(self, groups: Tensor) -> Tensor:
        """The trits of the best ratio of scales that add up to the largest weight."""
        peak = groups.abs().amax(1)
        tried = []
        for step in range(1, self.ratios + 1):
            ratio = step / (self.ratios + 1)
            trits = nearest_trits(groups, torch.stack((peak, ratio * peak)) / (1 + ratio))
            scales = best_scales(groups, trits, self.ridge)
            tried.append((scales, trits, errors(groups, scales, trits)))
        return reduce(better_of, tried)[1]

    def alternated(self, groups: Tensor, trits: Tensor) -> Found:
        """Scales, trits and squared errors where turns from some trits end; never above the start.

        Groups have a root mean square of 1.
        """
        scales, trits = best_scales(groups, trits, self.ridge), trits.clone()
        least = errors(groups, scales, trits)
        left = torch.arange(len(groups), device=groups.device)
        for _ in range(self.turns):
            own = groups[left]
            planes = nearest_trits(own, scales[:, left])
            found = best_scales(own, planes, self.ridge)
            error = errors(own, found, planes)
            better = error < least[left]
            moved = (found - scales[:, left]).abs().amax(0) > self.epsilon
            at = left[better]
            scales[:, at], trits[:, at] = found[:, better], planes[:, better]
            least[at] = error[better]
            left = left[better & moved]
            if not len(left):
                break
        return scales, trits, least
