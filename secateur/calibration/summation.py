"""Statistics of the tokens of all ranks, from those that each has taken of its own."""

import torch

from secateur.calibration.needs import BlockStatistics
from secateur.distributed.collectives import Ranks


def add_up(statistics: BlockStatistics, ranks: Ranks) -> None:
    """Replace statistics by those of the tokens of all ranks, in place.

    All ranks call it, with statistics of the same needs.
    """
    if ranks.alone:
        return
    found = [statistics[need] for need in sorted(statistics, key=lambda need: need.id)]
    tokens = torch.tensor([statistic.tokens for statistic in found])
    ranks.all_reduce([tokens])
    # One that has enough tokens, or sees none, has no sum.
    shapes = ranks.all_gather([None if s.total is None else [*s.total.shape] for s in found])
    for place, (statistic, count) in enumerate(zip(found, tokens.tolist(), strict=True)):
        known = [shape for own in shapes if (shape := own[place]) is not None]
        if statistic.total is None and known:
            statistic.total = torch.zeros(known[0], dtype=torch.float64, device=ranks.device)
        statistic.tokens = count
        if statistic.total is not None:
            ranks.all_reduce([statistic.total])
