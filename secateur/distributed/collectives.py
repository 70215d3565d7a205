"""The ranks of one program: which one this is, what it works on, and what it tells the others."""

import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from secateur.distributed.messages import Value, pack, unpack
from secateur.utils.errors import InputError, first_line

if TYPE_CHECKING:
    from secateur.distributed.liveness import Liveness

T = TypeVar("T")
CHUNK = 2**26  #: bytes that pass at a time, as sums need as much memory again


@dataclass(eq=False)
class Ranks:
    """One of several processes that run the same program; by default the only one.

    Every rank calls the same methods in the same order, and a lone process does too: there each
    returns at once. Results do not depend on the number of ranks, up to the order of sums. Use
    :attr:`leader` where one rank decides or writes.

    Waiting for another rank has no limit, as that rank may be solving for an hour; one that has
    ended is noticed by :class:`~secateur.distributed.liveness.Liveness`.

    Attributes:
        rank: number of this process.
        world_size: how many there are.
        local_world_size: how many of them are on this machine.
        device: where tensors of other ranks arrive.
        liveness: what knows which ranks are still there; None in a process that is alone.
    """

    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    liveness: "Liveness | None" = None
    _nccl: dist.ProcessGroup | None = None

    @property
    def leader(self) -> bool:
        """Whether this is the rank that decides, writes and prints."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other rank."""
        return self.world_size == 1

    def owns(self, number: int) -> bool:
        """Whether a piece of work, dealt out in turn by its number, is this rank's."""
        return number % self.world_size == self.rank

    def share(self, windows: int, rows: int) -> slice:
        """This rank's part of the windows, which one process takes in batches of ``rows``.

        A part is made of whole batches, so that sums are rounded as in one process. Where there are
        fewer batches than ranks, some ranks have none.
        """
        batches = -(-windows // rows)
        first, last = (-(-batches * i // self.world_size) for i in (self.rank, self.rank + 1))
        return slice(first * rows, min(last * rows, windows))

    def use_device(self, kind: str) -> torch.device:
        """Choose this rank's device: the CPU, or the GPU of its local number.

        Tensors on GPUs pass by NCCL where every rank has a GPU of its own, and by gloo elsewhere.

        Raises:
            InputError: there is no GPU on this machine.
        """
        if kind != "cuda":
            self.device = torch.device(kind)
        elif self.device.type != "cuda":
            if not torch.cuda.device_count():
                raise InputError(
                    f"rank {self.rank} finds no GPU on {socket.gethostname()}, and rank 0 has one. "
                    f"Say --device cpu, or leave this machine out."
                )
            local = int(os.environ.get("LOCAL_RANK", "0"))
            self.device = torch.device("cuda", local % torch.cuda.device_count())
            torch.cuda.set_device(self.device)
            uuid = torch.cuda.get_device_properties(self.device).uuid
            found = self.all_gather(f"{socket.gethostname()} {uuid}")
            if dist.is_nccl_available() and len({*found}) == self.world_size:
                os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # errors are raised, not fatal
                self._nccl = dist.new_group(backend="nccl")
        return self.device

    def barrier(self) -> None:
        """Wait until all ranks have come here."""
        if not self.alone:
            with self._connected():
                dist.barrier()

    def broadcast(self, make: Callable[[], T], src: int = 0) -> T:
        """The value that rank ``src`` makes, on every rank; see :data:`Value` for what it may be.

        ``make`` runs on that rank alone.
        """
        if self.alone:
            return make()
        if self.rank == src:
            value = make()
            self._send(value, src)
            return value
        return self._receive(src)

    def agree(self, own: T) -> T:
        """The leader's value, on every rank: a decision that may differ by rounding or timing."""
        return self.broadcast(lambda: own)

    def all_gather(self, own: T) -> list[T]:
        """The value of each rank, by rank; see :data:`Value` for what it may be."""
        return [self.broadcast(lambda: own, src) for src in range(self.world_size)]

    def all_reduce(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by their sums over all ranks, in place."""
        if self.alone:
            return
        for tensor in tensors:
            self._wait_for_nccl(tensor)
            for part, group in self._chunks(tensor):
                with self._connected():
                    dist.all_reduce(part, group=group)

    def broadcast_tensors(self, tensors: Iterable[Tensor], src: int = 0) -> None:
        """Give tensors the numbers that they have on rank ``src``, in place."""
        if self.alone:
            return
        for tensor in tensors:
            self._wait_for_nccl(tensor)
            for part, group in self._chunks(tensor, as_bytes=True):
                with self._connected():
                    dist.broadcast(part, src, group=group)

    def _send(self, value: Value, src: int) -> None:
        content, tensors = pack(value)
        text = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        self.broadcast_tensors([torch.tensor([len(text)]), text], src)
        self.broadcast_tensors((tensor.to(self.device) for tensor in tensors), src)

    def _receive(self, src: int) -> T:  # type: ignore[type-var]
        size = torch.tensor([0])
        self.broadcast_tensors([size], src)
        text = torch.empty(int(size), dtype=torch.uint8)
        self.broadcast_tensors([text], src)
        value, tensors = unpack(text.numpy().tobytes(), self.device)
        self.broadcast_tensors(tensors, src)
        found: T = value
        return found

    def _wait_for_nccl(self, tensor: Tensor) -> None:
        """Let the ranks meet by gloo first, as NCCL waits with a limit."""
        if self._nccl is not None and tensor.is_cuda:
            self.barrier()

    def _chunks(
        self, tensor: Tensor, as_bytes: bool = False
    ) -> Iterator[tuple[Tensor, dist.ProcessGroup | None]]:
        """Chunks of a tensor and the group that they pass by; it takes what they have become."""
        group = self._nccl if tensor.is_cuda else None
        flat = (tensor if group is not None else tensor.cpu()).contiguous().flatten()
        through = flat.view(torch.uint8) if as_bytes else flat
        for part in through.split(CHUNK // through.element_size()):
            if len(part):
                yield part, group
        if flat.data_ptr() != tensor.data_ptr():
            tensor.copy_(flat.view(tensor.shape))

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """Where the connection breaks, say which rank has ended."""
        try:
            yield
        except RuntimeError as error:
            assert self.liveness is not None
            raise self.liveness.explained(first_line(error)) from error


#: a process that is alone
ALONE = Ranks()
