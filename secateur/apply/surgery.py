"""Plan and statistics to weights: narrow the units of one block."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from secateur.apply.narrowing_messages import gather_narrowings
from secateur.calibration.needs import BlockStatistics, of_unit
from secateur.distributed.collectives import ALONE, Ranks
from secateur.methods.base import Method
from secateur.models.block import Block
from secateur.structure.narrowing import Narrowing
from secateur.structure.units import Unit
from secateur.utils.errors import InputError

Part = tuple[Tensor, Tensor | None]  #: weight and bias of a map


def narrow_block(
    block: Block,
    units: list[Unit],
    sizes: Mapping[str, int],
    method: Method,
    statistics: BlockStatistics,
    ranks: Ranks = ALONE,
) -> None:
    """Bring the units of a block to their sizes, in place; units at full size stay untouched.

    Several ``ranks`` solve a unit each, and all narrow all.
    """
    changing = [unit for unit in units if sizes[unit.name] < unit.size]
    with block.solving():
        own = {
            unit.name: method.solve(unit, block, of_unit(statistics, unit)).at(sizes[unit.name])
            for place, unit in enumerate(changing)
            if ranks.owns(block.index + place)
        }
    found = gather_narrowings(own, ranks)
    for unit in changing:
        narrow_unit(block, unit, found[unit.name])
    check_finite(block)


@contextmanager
def narrowed(block: Block, unit: Unit, narrowing: Narrowing) -> Iterator[None]:
    """A block with one unit below its full size, for as long as it takes to look at it."""
    with block.view(unit).kept():
        narrow_unit(block, unit, narrowing)
        yield


def narrow_unit(block: Block, unit: Unit, narrowing: Narrowing) -> None:
    """Bring one unit of a block to another size, in place; it may come from another device."""
    block.view(unit).narrow(narrowing.to(block.device))


def check_finite(block: Block) -> None:
    """Refuse what narrowing should never give.

    Raises:
        InputError: a weight of the block is NaN or infinite.
    """
    for name, parameter in block.module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise InputError(
                f"block {block.index}: narrowing gave {name} NaN or infinite numbers; give the "
                f"method larger ridges."
            )
