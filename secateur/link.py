"""What holds the processes of one run together: where they meet, and who is still there.

Processes meet before anything passes between them, and wait for each other without a limit, as
one may be at work for hours. A thread in each looks after the others meanwhile.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from secateur.errors import InputError, first_line

CHUNK = 2**26  # bytes that pass at a time
PASSING = timedelta(seconds=40)  # most that a chunk may take
JOINING = timedelta(minutes=10)  # most that all may take to start
BEAT = 1.0  # seconds between two looks at the others
SILENCE = 40.0  # of a process on another machine, which then counts as gone
GRACE = 15.0  # seconds for what is running to end, when another is gone
ADVICE = "Type the command again; compress then goes on."


class RankGoneError(KeyboardInterrupt):
    """Another process has ended; what is finished stays, as when a person interrupts."""


class RankFailedError(InputError):
    """Another process refused its input, and says so here."""


@dataclass(frozen=True)
class Place:
    """Where a process runs: a machine, a space of process ids on it, and the id."""

    host: str
    space: str
    pid: int

    @classmethod
    def here(cls) -> "Place":
        """This process."""
        try:
            space = str(Path("/proc/self/ns/pid").readlink())
        except OSError:
            space = ""
        return cls(socket.gethostname(), space, os.getpid())

    def beside(self, other: "Place") -> bool:
        """Whether they can see each other's ids."""
        return (self.host, self.space) == (other.host, other.space)

    @property
    def alive(self) -> bool:
        """Whether there is a process of this id, beside this one, that has not ended."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        return state not in "ZX"


class Link:
    """The connection of a process with the others of its run."""

    def __init__(self, rank: int, world: int, store: Any, first_keeps: bool) -> None:
        self.rank, self.world = rank, world
        self._store, self._first_keeps = store, first_keeps  # the store
        self._rounds = 0
        self.device = torch.device("cpu")
        self.neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        self._fast: dist.ProcessGroup | None = None
        self._trouble: BaseException | None = None
        self._ended = False
        self._closed = threading.Event()
        self._heard: dict[int, tuple[bytes, float]] = {}
        store.set(f"place/{rank}", json.dumps(asdict(Place.here())))
        self._peers: dict[int, Place] = {}
        signal.signal(signal.SIGTERM, self._told_to_end)
        threading.Thread(target=self._look_after, daemon=True).start()
        self.meet()
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=PASSING)

    @classmethod
    def from_environment(cls) -> "Link | None":
        """As torchrun says; None in a process that is alone.

        Raises:
            InputError: what it says is incomplete, or the others can't be reached.
        """
        given = {n: os.environ.get(n, "") for n in ("RANK", "MASTER_ADDR", "MASTER_PORT")}
        world = os.environ.get("WORLD_SIZE", "1")
        if world == "1" or not all(given.values()):
            return None
        try:
            rank, count, port = int(given["RANK"]), int(world), int(given["MASTER_PORT"])
            first_keeps = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            hosting, address = first_keeps and not rank, given["MASTER_ADDR"]
            store: Any = dist.TCPStore(  # type: ignore[attr-defined]
                address, port, None, hosting, JOINING, wait_for_workers=False
            )
        except (ValueError, RuntimeError) as error:
            raise InputError(
                f"rank {given['RANK']} of {world} does not reach the others at "
                f"{given['MASTER_ADDR']}:{given['MASTER_PORT']} ({first_line(error)}). Start it by "
                f"torchrun."
            ) from error
        run = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        own: Any = dist.PrefixStore(f"secateur-{run}", store)  # type: ignore[attr-defined]
        return cls(rank, count, own, first_keeps)

    def meet(self) -> None:
        """Wait for all others to come here."""
        self._rounds += 1
        key, pause = f"round/{self._rounds}", 0.0002
        with self._lasting():
            self._store.add(key, 1)
            while self._store.add(key, 0) < self.world:
                time.sleep(pause)
                pause = min(1.3 * pause, 0.05)
            if not self.rank and self._rounds > 2:  # all have left that one
                self._store.delete_key(f"round/{self._rounds - 2}")

    def settle(self, kind: str) -> torch.device:
        """Take a device; tensors pass by NCCL where every process has a GPU of its own."""
        if kind != "cuda":
            self.device = torch.device(kind)
        elif self._fast is None:
            local = int(os.environ.get("LOCAL_RANK", "0"))
            self.device = torch.device("cuda", local % torch.cuda.device_count())
            torch.cuda.set_device(self.device)
            self._hasten(self.device)
        return self.device

    def _hasten(self, device: torch.device) -> None:
        own = f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}"
        self._store.set(f"gpu/{self.rank}", own)
        self.meet()
        found = {self._store.get(f"gpu/{rank}") for rank in range(self.world)}
        if dist.is_nccl_available() and len(found) == self.world:
            os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # a wait that ends when its time is over
            self._fast = dist.new_group(backend="nccl", timeout=PASSING)

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor by the sum of those of all; they must have met."""
        for part, group in passing(tensor, self._fast):
            with self._lasting():
                dist.all_reduce(part, group=group)

    def pass_on(self, tensor: Tensor, by: int) -> None:
        """Give the others the numbers of one; they must have met."""
        for part, group in passing(tensor, self._fast, raw=True):
            with self._lasting():
                dist.broadcast(part, by, group=group)

    @contextmanager
    def _lasting(self) -> Iterator[None]:
        """Where the connection breaks, say who broke it."""
        try:
            yield
        except RuntimeError as error:
            reason = self.reason(10.0)
            text = f"the connection to the other ranks broke ({first_line(error)}). {ADVICE}"
            raise reason or RankGoneError(text) from error

    def lost(self) -> BaseException | None:
        """Why it can't go on, as far as it can be seen now, or None."""
        if self._store.add("failures", 0):
            for rank in range(self.world):
                if rank != self.rank and self._store.check([f"failure/{rank}"]):
                    found = json.loads(self._store.get(f"failure/{rank}"))
                    kind = RankFailedError if found["input"] else RankGoneError
                    return kind(found["message"])
        here, gone = Place.here(), []
        for rank in range(self.world):
            if rank == self.rank or not self._store.check([f"place/{rank}"]):
                continue
            if rank not in self._peers:
                self._peers[rank] = Place(**json.loads(self._store.get(f"place/{rank}")))
            peer = self._peers[rank]
            there = peer.alive if here.beside(peer) else self._beats(rank)
            if not there and not self._store.check([f"bye/{rank}"]):
                gone.append(rank)
        if not gone:
            return None
        speaks = min({*range(self.world)} - {*gone}) == self.rank
        which = f"rank {gone[0]}" if len(gone) == 1 else f"ranks {', '.join(map(str, gone))}"
        where = f"on {self._peers[gone[0]].host}"
        if not speaks:
            return RankGoneError("")
        return RankGoneError(
            f"{which} of {self.world} ({where}) {'is' if len(gone) == 1 else 'are'} gone: killed, "
            f"perhaps for want of memory. {ADVICE}"
        )

    def _beats(self, rank: int) -> bool:
        """Whether a process on another machine has been heard of."""
        key, now = f"beat/{rank}", time.monotonic()
        beat = self._store.get(key) if self._store.check([key]) else b""
        last, at = self._heard.get(rank, (None, now))
        if beat != last:
            self._heard[rank] = (beat, now)
            return True
        return now - at < SILENCE

    def _look_after(self) -> None:
        """In a thread: say that this one lives, and look whether the others do."""
        beat = 0
        while not self._closed.wait(BEAT):
            beat += 1
            try:
                self._store.set(f"beat/{self.rank}", str(beat))
                self._trouble = self.lost()
            except RuntimeError:  # whoever kept it is gone
                self._trouble = self.severed()
            if self._trouble is not None:
                os.kill(os.getpid(), signal.SIGTERM)
                if not self._closed.wait(GRACE):
                    print(f"error: {self._trouble}", file=sys.stderr, flush=True)
                    os._exit(1)
                return

    def severed(self) -> RankGoneError:
        """What to say where the connection itself is gone."""
        what = "rank 0" if self._first_keeps else "what started the ranks"
        speaks = self.rank == int(self._first_keeps)
        return RankGoneError(f"{what} is gone. {ADVICE}" if speaks else "")

    def _told_to_end(self, number: int, frame: FrameType | None) -> None:
        """At a SIGTERM, of torchrun or of the thread: end as when a person interrupts."""
        if self._ended:
            return
        self._ended = True
        reason = self.reason()
        if reason is not None:  # whoever looks for what went first must not find this one
            with suppress(RuntimeError):
                self._store.set(f"bye/{self.rank}", "")
        raise reason or KeyboardInterrupt

    def reason(self, patience: float = 0.0) -> BaseException | None:
        """Why it can't go on; waits some seconds for that to be seen."""
        until = time.monotonic() + patience
        while self._trouble is None:
            try:
                self._trouble = self.lost()
            except RuntimeError:
                self._trouble = self.severed()
            if self._trouble is not None or time.monotonic() > until:
                break
            time.sleep(0.2)
        return self._trouble

    def fail(self, message: str, input_error: bool, patience: float = 0.0) -> None:
        """Tell the others that this one can't go on, and why.

        Waits so many seconds for the first one to say so by itself, and for it to end.
        """
        with suppress(RuntimeError):
            if patience and self._waited(patience):
                return
            content = {"message": message, "input": input_error}
            self._store.set(f"failure/{self.rank}", json.dumps(content))
            self._store.add("failures", 1)
            if patience:
                self._waited(GRACE)

    def _waited(self, patience: float) -> bool:
        """Whether the first one ended within some seconds, or is about to."""
        until = time.monotonic() + patience
        while not self._store.check(["failure/0"]):
            if time.monotonic() > until:
                return False
            time.sleep(0.1)
        return True

    def leave(self) -> None:
        """Part from the others when all is done."""
        self._ended = True
        self._store.set(f"bye/{self.rank}", "")
        self._closed.set()
        with suppress(RuntimeError):
            self._store.add("byes", 1)
            until = time.monotonic() + 10
            hosting = self._first_keeps and not self.rank
            while hosting and self._store.add("byes", 0) < self.world:
                if time.monotonic() > until:
                    break
                time.sleep(0.01)

    def quiet(self) -> None:
        """The process is about to end by itself, and needs no reason for it any more."""
        self._ended = True
        self._closed.set()


def passing(
    tensor: Tensor, fast: dist.ProcessGroup | None, raw: bool = False
) -> Iterator[tuple[Tensor, dist.ProcessGroup | None]]:
    """Chunks of a tensor and the group that they go through; it takes what they have become."""
    group = fast if tensor.is_cuda else None
    flat = (tensor if group is not None else tensor.cpu()).contiguous().flatten()
    through = flat.view(torch.uint8) if raw else flat
    for part in through.split(CHUNK // through.element_size()):
        if len(part):
            yield part, group
    if flat.data_ptr() != tensor.data_ptr():
        tensor.copy_(flat.view(tensor.shape))
