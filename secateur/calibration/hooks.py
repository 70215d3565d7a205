"""Hooks that feed the statistics of a block while its forward runs."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import Tensor

from secateur.calibration.needs import Need, Needs
from secateur.calibration.statistics import Statistic
from secateur.models.block import Block
from secateur.models.parts import entering
from secateur.structure.sites import BLOCK, Site


@contextmanager
def observed(block: Block, statistics: Mapping[Need, Statistic], mask: Tensor) -> Iterator[None]:
    """Feed the statistics of one block from hooks while its forward runs.

    What a block gets and gives as a whole is left to the caller, who has both.
    """

    def at(site: Site) -> list[Statistic]:
        return [s for need, s in statistics.items() if need.site == site and s.wants_more]

    def wanted(site: Site) -> bool:
        return bool(at(site))

    def feed(site: Site, *values: Tensor) -> None:
        for statistic in at(site):
            statistic.update(*values, mask=mask)

    with ExitStack() as stack:
        for site in dict.fromkeys(need.site for need in statistics):
            give = partial(feed, site)
            if site == Needs.BETWEEN_GRAM.site:
                assert block.anatomy.pre_norm is not None
                norm = block.module.get_submodule(block.anatomy.pre_norm.mlp_norm)
                stack.callback(norm.register_forward_pre_hook(entering(give, mask.shape)).remove)
            elif site.path != BLOCK:
                part = block.part(site.path)
                handle = part.watch(site.side, give, mask.shape, partial(wanted, site))
                stack.callback(handle.remove)
        yield
