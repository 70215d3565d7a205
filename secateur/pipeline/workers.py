"""A run on several processes: the first leads, the others do their share of what it is at."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from torch import Tensor

from secateur.allocate.base import Allocator, Evidence
from secateur.apply.block_journal import States
from secateur.apply.sequential import narrow_blocks
from secateur.calibration.collect import Store, calibrate
from secateur.calibration.needs import Need
from secateur.data.tokens import Tokens
from secateur.distributed.collectives import Ranks
from secateur.io.run_directory import Memo, at_once
from secateur.methods.base import Method
from secateur.models.block import Block
from secateur.models.model import Model, Settings
from secateur.models.streamed_loading import open_fitting
from secateur.scoring.evidence import score
from secateur.structure.units import EVERY_BLOCK, Unit
from secateur.utils.errors import InputError
from secateur.utils.precision import check_exact

Advance = Callable[[int], None]


class Order(Protocol):
    """What all are to do next; the model is the one that was opened last."""

    def follow(self, ranks: Ranks, model: Model | None) -> Model | None:
        """Do this one's share of it, and give the model that is open then."""


@dataclass(frozen=True)
class Settle:
    """Take a device of a kind."""

    kind: str

    def follow(self, ranks: Ranks, model: Model | None) -> Model | None:
        """Likewise; what was open makes room."""
        ranks.settle(self.kind)
        return None


@dataclass(frozen=True)
class Open:
    """Open a model, as the leader has."""

    source: str
    settings: Settings
    folder: Path

    def follow(self, ranks: Ranks, model: Model | None) -> Model | None:
        """Likewise."""
        if not self.folder.is_dir():
            raise InputError(
                f"rank {ranks.rank} does not see {str(self.folder)!r}; let OUT and --statistics "
                f"be on a disk that all machines share."
            )
        settings = replace(self.settings, device=str(ranks.device))
        return open_fitting(self.source, settings, self.folder)


@dataclass(frozen=True)
class Calibrate:
    """See :func:`~secateur.calibration.collect.calibrate`."""

    tokens: Tokens
    needs: frozenset[Need]

    def follow(self, ranks: Ranks, model: Model | None) -> Model | None:
        """Likewise."""
        assert model is not None
        calibrate(model, self.tokens, self.needs, Store(), ranks=ranks)
        return model


@dataclass(frozen=True)
class ScoreUnits:
    """See :func:`~secateur.scoring.evidence.score`."""

    method: Method
    folder: Path
    tokens: Tokens
    allocator: Allocator

    def follow(self, ranks: Ranks, model: Model | None) -> Model | None:
        """Likewise."""
        assert model is not None
        given = (Store(self.folder), self.tokens, self.allocator)
        score(model, self.method, *given, ranks=ranks)
        return model


@dataclass(frozen=True)
class Narrow:
    """See :func:`~secateur.apply.sequential.narrow_blocks`."""

    method: Method
    units: Sequence[Unit]
    sizes: Mapping[str, int]
    tokens: Tokens
    folder: Path
    states: Path | None
    done: int
    kept: dict[str, Tensor]

    def follow(self, ranks: Ranks, model: Model | None) -> Model | None:
        """Likewise; the blocks are of no more use here."""
        assert model is not None
        given = (self.units, self.sizes, self.tokens, Store(self.folder))
        journal = None if self.states is None else States(self.states, self.done, ranks)
        for block in narrow_blocks(
            model, self.method, *given, journal=journal, ranks=ranks, kept=self.kept
        ):
            if journal is not None:
                journal.record(block)
        return None


@dataclass(frozen=True)
class Crew:
    """All processes of a run, as its leader sees them; by default only itself."""

    ranks: Ranks = Ranks()  # noqa: RUF009 (frozen)

    def open(self, source: str, settings: Settings, folder: Path | None) -> Model:
        """Open a model, here and where the others are.

        Raises:
            InputError: see ``open_fitting``, or a device for one process.
        """
        if self.ranks.link is None:
            return open_fitting(source, settings, folder)
        assert folder is not None
        if ":" in settings.device:
            raise InputError(
                f"--device {settings.device}: every rank takes the GPU of its own number. Say "
                f"{settings.device.partition(':')[0]}."
            )
        check_exact(settings.torch_device(), "a run of several processes")
        kind = settings.torch_device().type
        self._order(lambda: Settle(kind))
        settings = replace(settings, device=str(self.ranks.settle(kind)))
        copies = self.ranks.neighbours if kind == "cpu" else 1
        model = open_fitting(source, settings, folder, copies)
        stream = "off" if model.residence is None else "on"
        folder.mkdir(parents=True, exist_ok=True)
        self._order(lambda: Open(source, replace(settings, stream=stream), folder.absolute()))
        return model

    def calibrate(
        self, model: Model, tokens: Tokens, needs: frozenset[Need], store: Store, advance: Advance
    ) -> None:
        """See :func:`~secateur.calibration.collect.calibrate`."""
        self._order(lambda: Calibrate(tokens, needs))
        calibrate(model, tokens, needs, store, advance, self.ranks)

    def score(
        self,
        model: Model,
        method: Method,
        store: Store,
        tokens: Tokens,
        allocator: Allocator,
        *,
        advance: Advance,
        memo: Memo = at_once,
    ) -> Evidence:
        """See :func:`~secateur.scoring.evidence.score`."""
        self._order(lambda: ScoreUnits(method, _folder(store), tokens, allocator))
        return score(
            model,
            method,
            store,
            tokens,
            allocator,
            advance=advance,
            memo=memo,
            ranks=self.ranks,
        )

    def narrow_blocks(
        self,
        model: Model,
        method: Method,
        units: Sequence[Unit],
        sizes: Mapping[str, int],
        tokens: Tokens,
        store: Store,
        journal: States | None = None,
        kept: dict[str, Tensor] | None = None,
    ) -> Iterator[Block]:
        """See :func:`~secateur.apply.sequential.narrow_blocks`."""
        if any(
            unit.block == EVERY_BLOCK for unit in units
        ):  # one thing, from the first to the last
            return narrow_blocks(model, method, units, sizes, tokens, store, journal)
        states = None if journal is None else journal.folder.absolute()
        given, told = (method, units, dict(sizes), tokens), dict(kept or {})
        done = 0 if journal is None else journal.done
        self._order(lambda: Narrow(*given, _folder(store), states, done=done, kept=told))
        more = (sizes, tokens, store)
        return narrow_blocks(
            model, method, units, *more, journal=journal, ranks=self.ranks, kept=kept
        )

    def dismiss(self) -> None:
        """There is nothing more to do."""
        self._order(lambda: None)

    def _order(self, make: Callable[[], Order | None]) -> None:
        if self.ranks.link is not None:
            self.ranks.told(make)


ALONE = Crew()


def follow(ranks: Ranks) -> None:
    """Do what the leader orders, until there is nothing more to do."""
    model: Model | None = None
    while (order := ranks.told(_nothing)) is not None:
        model = order.follow(ranks, model)


def _nothing() -> Order | None:
    return None


def _folder(store: Store) -> Path:
    assert store.folder is not None
    return store.folder.absolute()
