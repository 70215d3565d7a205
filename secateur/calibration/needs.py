"""Which statistics methods ask for, and where in a block they are taken."""

from collections.abc import Iterable, Mapping
from typing import ClassVar, NamedTuple

from secateur.calibration.pair_scores import PairScores
from secateur.calibration.statistics import (
    Angle,
    Change,
    Cross,
    Energy,
    Gram,
    HeadGram,
    Influence,
    Moments,
    Statistic,
)
from secateur.models.block import Block
from secateur.structure.sites import BLOCK, Site, part_name
from secateur.structure.units import READS, Unit

MOST_PARTS = 8  # of one kind in a block


class Need(NamedTuple):
    """A statistic of the activations at a site of a block.

    A method names sites of the first part of a kind ("mlp"); the statistic is then taken in every
    such part of a block, and :func:`of_unit` gives the method those of its unit's own part.
    """

    site: Site
    kind: type[Statistic]

    @property
    def id(self) -> str:
        """What it is called in files."""
        return f"{self.site.id}.{self.kind.id}"

    def at(self, path: str) -> "Need":
        """The same statistic in another part."""
        return Need(self.site.at(path), self.kind)


BlockStatistics = Mapping[Need, Statistic]


class Needs:
    """The statistics in use."""

    HIDDEN_GRAM: ClassVar = Need(Site("mlp", "hidden"), Gram)
    QUERY_ENERGY: ClassVar = Need(Site("attention", "query"), Energy)
    KEY_ENERGY: ClassVar = Need(Site("attention", "key"), Energy)
    VALUE_GRAM: ClassVar = Need(Site("attention", "value"), HeadGram)
    INFLUENCE: ClassVar = Need(Site("block", "block"), Influence)
    ANGLE: ClassVar = Need(Site("block", "block"), Angle)
    CHANGE: ClassVar = Need(Site("block", "block"), Change)
    MIXED_GRAM: ClassVar = Need(Site("attention", "mixed"), Gram)
    HIDDEN_ENERGY: ClassVar = Need(Site("mlp", "hidden"), Energy)
    HIDDEN_MOMENTS: ClassVar = Need(Site("mlp", "hidden"), Moments)
    MIXED_MOMENTS: ClassVar = Need(Site("attention", "mixed"), Moments)
    PAIR_SCORES: ClassVar = Need(Site("attention", "scores"), PairScores)
    BETWEEN_GRAM: ClassVar = Need(Site("block", "between"), Gram)
    BEHIND_GRAM: ClassVar = Need(Site("block", "behind"), Gram)
    HIDDEN_TARGET: ClassVar = Need(Site("mlp", "hidden"), Cross)
    MIXED_TARGET: ClassVar = Need(Site("attention", "mixed"), Cross)
    ATTENTION_INPUT_GRAM: ClassVar = Need(Site("attention", "attention_inputs"), Gram)
    OUTPUT_INPUT_GRAM: ClassVar = Need(Site("attention", "output_inputs"), Gram)
    MLP_INPUT_GRAM: ClassVar = Need(Site("mlp", "mlp_inputs"), Gram)


#: of the input of what reads a unit, by the unit's kind
GRAMS = {kind: Need(site, Gram) for kind, site in READS.items()}
MOMENTS = {kind: Need(site, Moments) for kind, site in READS.items()}
#: of what each linear layer of a block reads
INPUTS = frozenset(
    {
        Needs.ATTENTION_INPUT_GRAM,
        Needs.OUTPUT_INPUT_GRAM,
        Needs.MLP_INPUT_GRAM,
        Needs.HIDDEN_GRAM,
    }
)


def in_block(needs: Iterable[Need], block: Block) -> list[Need]:
    """Statistics of a block: each need in every part that has its site; none in a part without."""
    return [Need(site, need.kind) for need in needs for site in block.sites(need.site)]


def in_parts(needs: Iterable[Need]) -> list[Need]:
    """Each need in every part that a block may have."""
    return [
        need.at(part_name(need.site.path, number)) if number else need
        for need in needs
        for number in range(1 if need.site.path == BLOCK else MOST_PARTS)
    ]


def of_unit(statistics: BlockStatistics, unit: Unit) -> BlockStatistics:
    """The statistics of a block as a method asks for them: those of the unit's own part."""
    first = Site(unit.part, "").role
    if unit.part == first:
        return statistics
    own = {n.at(first): s for n, s in statistics.items() if n.site.path == unit.part}
    whole = {n: s for n, s in statistics.items() if n.site.role != first}
    return {**whole, **own}
