"""Methods that choose MLP channels and whole KV heads by a Gram and refit what reads them."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from secateur.calibration.needs import GRAMS, BlockStatistics, Need
from secateur.linalg.least_squares import damped, least_squares, refit_errors
from secateur.methods.base import Method, Solution
from secateur.models.block import Block
from secateur.structure.error_curve import Curve
from secateur.structure.narrowing import Narrowing
from secateur.structure.units import WHOLE_HEADS, Heads, Unit
from secateur.utils.options import option

if TYPE_CHECKING:
    from secateur.models.model import Model


@dataclass(frozen=True)
class RefittedMethod(Method):
    """Prunes MLP channels and KV heads, and refits the weights that read the remaining ones.

    With x what the consumer W reads, C = E xᵀx and S the coordinates that stay,

        Ŵ = (C_SS + λI)⁻¹ (C_S: + λ I_S:) W,   λ = ridge · mean of the diagonal of C

    which is W with what all removals of the optimal brain surgeon add to it. C leaves out what
    value biases add to x: a constant, as attention sums to one. Where a head goes or its rows
    change, that constant would give something else; the output projection's bias makes up for it.
    """

    kinds: ClassVar[tuple[str, ...]] = WHOLE_HEADS
    needs: ClassVar[frozenset[Need]] = frozenset(GRAMS.values())
    ridge: float = option(0.01, "ridge of the Gram matrices, relative to their mean diagonal", 0.0)

    def units(self, model: "Model", multiple_of: int) -> list[Unit]:
        """Narrowed heads get an output bias where values have one."""
        return [
            replace(
                unit,
                new_bias=unit.value_bias
                and model.blocks[unit.block].attention_of(unit).module.o_proj.bias is None,
            )
            if isinstance(unit, Heads)
            else unit
            for unit in super().units(model, multiple_of)
        ]


def problem(unit: Unit, block: Block, statistics: BlockStatistics) -> tuple[Tensor, Tensor, int]:
    """C, W as (coordinates, outputs), and the coordinates of a channel or KV head."""
    rows = block.axis(unit).read()
    gram = statistics[GRAMS[unit.kind]].mean
    return gram, rows.flatten(0, 1), rows.shape[1]


def coordinates(which: Tensor, width: int) -> Tensor:
    """The coordinates of some channels or KV heads, one after the other."""
    own = torch.arange(width, device=which.device)
    return (which.unsqueeze(1) * width + own).flatten()


def refitted(hessian: Tensor, weight: Tensor, keep: Tensor, width: int, what: str) -> Tensor:
    """Rows of the consumer for channels or heads ``keep``: H_SS⁻¹ H_S: W."""
    at = coordinates(keep, width)
    kept = hessian[at]
    return least_squares(kept[:, at], kept @ weight, weight[at], 0.0, what)


def narrowing(unit: Unit, block: Block, keep: Tensor, rows: Tensor | None) -> Narrowing:
    """Kept channels or heads, with other rows of the consumer or, for None, with their own."""
    bias, axis = None, block.axis(unit)
    if (own := axis.constant) is not None:
        dense, means = axis.read(), own.double()
        at, dense = coordinates(keep, dense.shape[1]), dense.flatten(0, 1)
        bias = means @ dense - means[at] @ (dense[at] if rows is None else rows)
    return Narrowing(keep=keep, consumer=rows, bias=bias)


def in_order(
    unit: Unit, block: Block, statistics: BlockStatistics, order: Tensor, ridge: float
) -> Solution:
    """The first channels or heads of an order stay, and what reads them is refitted."""
    gram, weight, width = problem(unit, block, statistics)
    hessian = damped(gram, ridge)

    def at(size: int) -> Narrowing:
        keep = torch.sort(order[:size]).values
        return narrowing(unit, block, keep, refitted(hessian, weight, keep, width, unit.name))

    def curve() -> Curve:
        at_coordinates = coordinates(order, width)
        return Curve.of(refit_errors(gram, weight, at_coordinates, ridge, unit.name)[::width])

    return Solution(curve, at)
