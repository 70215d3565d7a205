"""Processes that share the work of one run, as torchrun starts them."""

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from secateur.calibration.needs import BlockStatistics
    from secateur.distributed.rendezvous import Link

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """One of some processes, of which the first leads; by default one that is alone.

    What is shared is the same, up to the order of sums, however many they are. All must call the
    same of these methods, in the same order.
    """

    link: "Link | None" = None

    @property
    def rank(self) -> int:
        """The number of this process."""
        return 0 if self.link is None else self.link.rank

    @property
    def world(self) -> int:
        """How many there are."""
        return 1 if self.link is None else self.link.world

    @property
    def leads(self) -> bool:
        """Whether this one decides and writes."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """Where what is passed on arrives."""
        return torch.device("cpu") if self.link is None else self.link.device

    @property
    def neighbours(self) -> int:
        """How many are on this machine."""
        return 1 if self.link is None else self.link.neighbours

    def settle(self, kind: str) -> torch.device:
        """Take a device of this kind, on a machine with several GPUs one of its own."""
        assert self.link is not None
        return self.link.settle(kind)

    def mine(self, number: int) -> bool:
        """Whether a piece of work is this one's, dealt out in turn."""
        return number % self.world == self.rank

    def share(self, windows: int, rows: int) -> slice:
        """This one's part of the windows, in batches of so many where it is alone.

        A part is made of whole batches, so that numbers are rounded as in a process that is alone;
        where there are fewer batches than processes, some have none.
        """
        batches = -(-windows // rows)
        first, last = (-(-batches * i // self.world) for i in (self.rank, self.rank + 1))
        return slice(first * rows, min(last * rows, windows))

    def add_up(self, statistics: "BlockStatistics") -> None:
        """Let statistics be those of all tokens; each process has its part of them."""
        if self.link is None:
            return
        found = [statistics[need] for need in sorted(statistics, key=lambda n: (n[0], str(n[1])))]
        self.link.meet()
        counts = torch.tensor([[s.tokens for s in found], [s.total is None for s in found]])
        self.link.add_up(counts)
        if bool(counts[1].any()):  # one with enough tokens took none
            shapes = self.gathered([None if s.total is None else s.total.shape for s in found])
            for statistic, known in zip(found, zip(*shapes, strict=True), strict=True):
                shape = next((s for s in known if s is not None), None)
                if statistic.total is None and shape is not None:
                    statistic.total = torch.zeros(shape, dtype=torch.float64, device=self.device)
        for statistic, tokens in zip(found, counts[0].tolist(), strict=True):
            statistic.tokens = int(tokens)
            if statistic.total is not None:
                self.sum([statistic.total])

    def meet(self) -> None:
        """Wait for the others."""
        if self.link is not None:
            self.link.meet()

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by the sums of those of all."""
        if self.link is not None:
            for tensor in tensors:
                self.link.meet()
                self.link.add_up(tensor)

    def told(self, make: Callable[[], T], by: int = 0) -> T:
        """What one of them makes; the others are told."""
        if self.link is None:
            return make()
        if self.rank != by:
            self.link.meet()
            heard: T = self._read(self._passed(None, by))
            return heard
        found = make()
        data = _written(found)  # before the others wait for it, which they do with a limit
        self.link.meet()
        self._passed(data, by)
        return found

    def gathered(self, own: T) -> list[T]:
        """What each has, by rank."""
        if self.link is None:
            return [own]
        data = _written(own)
        self.link.meet()
        every = [self._passed(data, by) for by in range(self.world)]
        return [own if by == self.rank else self._read(one) for by, one in enumerate(every)]

    def _passed(self, data: Tensor | None, by: int) -> Tensor:
        """The bytes that one of them has; all have met."""
        assert self.link is not None
        size = torch.tensor([0 if data is None else len(data)])
        self.link.pass_on(size, by)
        if data is None or self.rank != by:
            data = torch.empty(int(size), dtype=torch.uint8)
        self.link.pass_on(data, by)
        return data

    def _read(self, data: Tensor) -> Any:
        """A value from bytes, between processes that trust each other."""
        content = io.BytesIO(data.numpy().tobytes())
        return torch.load(content, map_location=self.device, weights_only=False)

    def follow(self, tensors: Iterable[Tensor]) -> None:
        """Give tensors the numbers that they have where one leads."""
        if self.link is not None:
            for tensor in tensors:
                self.link.meet()
                self.link.pass_on(tensor, 0)


def _written(value: object) -> Tensor:
    """A value as bytes."""
    content = io.BytesIO()
    torch.save(value, content)
    return torch.frombuffer(content.getbuffer(), dtype=torch.uint8)


ALONE = Ranks()
