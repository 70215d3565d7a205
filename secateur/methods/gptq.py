"""GPTQ: quantization that compensates rounding errors in the columns that follow."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.linalg.column_updates import Settle, inverse_factor, sweep
from secateur.linalg.int_rounding import best_scale, codes_of
from secateur.methods.form import Metric
from secateur.methods.rtn import RTN, width
from secateur.structure.form import Form
from secateur.utils.options import option

COLUMNS = 128  # of a block in which groups play no part


@dataclass(frozen=True)
class GPTQ(RTN):
    """Quantize column by column, and compensate the error of each column in the following ones.

    With (H + λI)⁻¹ = CᵀC, C upper triangular, λ = ridge · mean of H's diagonal,

        q_j = clamp(round(w_j / s)),   w_k ← w_k − (w_j − q_j s) C_jk / C_jj   for k > j

    loses Σ_j ‖w_j − q_j s‖² / C_jj² in all, so a group takes the scale that makes its part of that
    sum least for the weights as they stand where the group begins. With ``act_order`` the columns
    of most energy come first, and scales are those of the dense weight, so that groups stay
    neighbours. With H = I it is ``rtn``. A Gram that isn't positive definite gets a larger ridge,
    with a warning. Don't calibrate it on text unlike what the model will be used on: it is fitted
    to it.

    Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
    Transformers", arXiv 2210.17323.
    """

    ridge: float = option(0.01, "ridge of H, relative to its mean diagonal", 0.0)
    act_order: int = option(0, "1 to quantize the inputs with most energy first", 0, 1)

    name: ClassVar[str] = "gptq"
    summary: ClassVar[str] = (
        "quantizes column by column and compensates each error in later columns"
    )
    source: ClassVar[str] = "arXiv 2210.17323"
    data_aware: ClassVar[bool] = True
    rereads: ClassVar[bool] = True

    def rounded(
        self, weight: Tensor, metric: Metric, form: Form, stored: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Codes (outputs, inputs) and scales (outputs, groups)."""
        bits, size = form.spec["bits"], width(form)
        order = torch.arange(weight.shape[1], device=weight.device)
        if self.act_order:
            order = torch.sort(metric.energy, descending=True, stable=True).indices
        group_of = order // size
        factor = inverse_factor(metric.gram[order][:, order], self.ridge, "GPTQ")
        costs = factor.diagonal() ** -2
        worth = torch.empty_like(costs)
        worth[order] = costs / costs.max()
        grouped = form.spec["group"] > 0 and not self.act_order
        groups, codes = weight.unflatten(1, (-1, size)), torch.empty_like(weight, dtype=torch.int8)
        if grouped:  # each when its turn has come
            scale = torch.empty_like(groups[..., 0], dtype=stored)
        else:
            scale = best_scale(groups, bits, self.scale_steps, stored, worth.view(-1, size))

        def begin(first: int, block: Tensor) -> Settle:
            if grouped:
                own = worth[first : first + size]
                scale[:, first // size] = best_scale(block, bits, self.scale_steps, stored, own)

            def settle(i: int, block: Tensor) -> Tensor:
                own = scale[:, group_of[first + i]]
                chosen = codes_of(block[:, i], own, bits)
                codes[:, order[first + i]] = chosen
                return chosen * own.double()

            return settle

        sweep(weight[:, order], factor, size if grouped else COLUMNS, begin)
        return codes, scale
