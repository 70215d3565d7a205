"""What holds the processes of one run together: where they meet, and who is still there.

Processes meet before anything passes between them, and once all have started they wait for each
other without a limit, as one may be at work for hours. A thread in each looks after the others
meanwhile, by way of the store that one machine keeps; another one sees that the store answers.
"""

import json
import math
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

from secateur.utils.errors import InputError, first_line

CHUNK = 2**26  # bytes that pass at a time
PASSING = timedelta(seconds=40)  # most that a chunk may take
JOINING = timedelta(minutes=5)  # most that all may take to start
BEAT = 1.0  # seconds between two looks at the others
SILENCE = 40.0  # of a process on another machine, which then counts as gone
STALL = 30  # beats without an answer of the store, which then counts as gone
NOTICE = 2.5  # beats in which the others notice what this one has
GRACE = 15.0  # seconds for what is running to end, when another is gone
ENDING = 25.0  # seconds that a process may take to end by itself
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

    def __init__(
        self, rank: int, world: int, stores: list[Any], first_keeps: bool, neighbours: int
    ) -> None:
        self.rank, self.world, self.neighbours = rank, world, neighbours
        # Two connections with one store, as whoever waits for a key keeps all others from its own.
        self._store, self._waiting = stores
        self._first_keeps = first_keeps  # the store
        self._rounds = 0
        self.device = torch.device("cpu")
        self._fast: dist.ProcessGroup | None = None
        self._trouble: BaseException | None = None
        self._joined = self._ended = False
        self._severed = False  # the store is gone
        self._closed, self._ending = threading.Event(), threading.Lock()
        self._looks = 0
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._peers: dict[int, Place] = {}
        signal.signal(signal.SIGTERM, self._told_to_end)
        try:
            self._join()
        except RuntimeError as error:
            message = f"rank {rank} of {world} can't join the others ({first_line(error)})."
            raise self.reason(10.0) or self._refusal(message) from error

    def _join(self) -> None:
        """Let the others know of this one, and wait until all have come."""
        self._store.set(f"place/{self.rank}", json.dumps(asdict(Place.here())))
        for work in (self._look_after, self._keep_time):
            threading.Thread(target=work, daemon=True).start()
        self.meet(time.monotonic() + JOINING.total_seconds())
        for rank in range(self.world):  # while it can be asked for
            self._peers[rank] = Place(**json.loads(self._store.get(f"place/{rank}")))
        self.meet()  # nobody ends before all know each other
        given = {"store": self._waiting, "rank": self.rank, "world_size": self.world}
        dist.init_process_group("gloo", **given, timeout=PASSING)
        self._joined = True

    @classmethod
    def from_environment(cls) -> "Link | None":
        """As torchrun says; None in a process that is alone.

        Raises:
            InputError: what it says is incomplete, or the others can't be reached, or don't come.
        """
        given = {n: os.environ.get(n, "") for n in ("RANK", "MASTER_ADDR", "MASTER_PORT")}
        world = os.environ.get("WORLD_SIZE", "1")
        if world == "1" or not all(given.values()):
            return None
        try:
            rank, count, port = int(given["RANK"]), int(world), int(given["MASTER_PORT"])
            neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", world))
            first_keeps = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            hosting, address = first_keeps and not rank, given["MASTER_ADDR"]
            stores = [
                dist.TCPStore(  # type: ignore[attr-defined]
                    address, port, None, keeps, JOINING, wait_for_workers=False
                )
                for keeps in (hosting, False)
            ]
        except (ValueError, RuntimeError) as error:
            raise InputError(
                f"rank {given['RANK']} of {world} does not reach the others at "
                f"{given['MASTER_ADDR']}:{given['MASTER_PORT']} ({first_line(error)}). Start it by "
                f"torchrun."
            ) from error
        run = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        own = [dist.PrefixStore(f"secateur-{run}", s) for s in stores]  # type: ignore[attr-defined]
        return cls(rank, count, own, first_keeps, neighbours)

    def meet(self, until: float = math.inf) -> None:
        """Wait for all others to come here."""
        self._rounds += 1
        key, pause = f"round/{self._rounds}", 0.0002
        with self._lasting():
            self._store.add(key, 1)
            while self._store.add(key, 0) < self.world:
                if time.monotonic() > until:
                    self._refuse_absence()
                time.sleep(pause)
                pause = min(1.3 * pause, 0.05)
            if not self.rank and self._rounds > 2:  # all have left that one
                self._store.delete_key(f"round/{self._rounds - 2}")

    def _refuse_absence(self) -> None:
        """Say who has not started."""
        absent = [r for r in range(self.world) if not self._store.check([f"place/{r}"])]
        if not absent:  # the last has come by now
            return
        raise self._refusal(
            f"{_named(absent)} of {self.world} {'has' if len(absent) == 1 else 'have'} not started "
            f"within {JOINING.total_seconds() / 60:.3g} minutes. Let every machine start its "
            f"ranks, by torchrun."
        )

    def _refusal(self, message: str) -> InputError:
        """Tell the others why there is no run; where one of them was first, that one says it."""
        self.quiet()
        with suppress(RuntimeError):
            if self._store.add("refusals", 1) > 1:
                return RankFailedError(message)
        self.fail(message, True)
        return InputError(message)

    def settle(self, kind: str) -> torch.device:
        """Take a device; tensors pass by NCCL where every process has a GPU of its own.

        Raises:
            InputError: there is none here.
        """
        if kind != "cuda":
            self.device = torch.device(kind)
        elif self._fast is None:
            if not torch.cuda.device_count():
                raise InputError(
                    f"rank {self.rank} finds no GPU on {socket.gethostname()}, and rank 0 has one. "
                    f"Say --device cpu, or leave this machine out."
                )
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
        where = f"on {self._peers[gone[0]].host}"
        if not speaks:
            return RankGoneError("")
        return RankGoneError(
            f"{_named(gone)} of {self.world} ({where}) {'is' if len(gone) == 1 else 'are'} gone: "
            f"killed, perhaps for want of memory. {ADVICE}"
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
        while not self._closed.wait(BEAT):
            self._looks += 1
            try:
                self._store.set(f"beat/{self.rank}", str(self._looks))
                trouble = self.lost()
            except RuntimeError:  # whoever kept it is gone
                trouble = self.severed()
            if trouble is not None:
                self._end(trouble)
                return

    def _keep_time(self) -> None:
        """In a thread: see that the other one gets on; a store that is cut off never answers.

        Beats are counted, not seconds: a process that was stopped for a while goes on.
        """
        last, silent = -1, 0
        while not self._closed.wait(BEAT):
            silent = silent + 1 if self._looks == last else 0
            last = self._looks
            if silent >= STALL:
                self._end(self.severed())
                return

    def _end(self, trouble: BaseException) -> None:
        """Let this process end as when it is interrupted, and by force where it does not."""
        if not self._ending.acquire(blocking=False):
            return
        self._trouble = trouble
        os.kill(os.getpid(), signal.SIGTERM)
        if not self._closed.wait(GRACE):
            told = isinstance(trouble, RankFailedError) and (self.rank or not self._joined)
            if str(trouble) and not told:
                print(f"error: {trouble}", file=sys.stderr, flush=True)
            os._exit(1)

    def severed(self) -> RankGoneError:
        """What to say where the store is gone; the first one that lives on each machine says it.

        This one stays for a moment, so that the others here see it alive and leave the word to it.
        """
        self._severed = True
        here = Place.here()
        known = {**self._peers, self.rank: here}
        alive = {r: p.alive for r, p in sorted(known.items()) if here.beside(p)}
        dead = [rank for rank, lives in alive.items() if not lives]
        first = next(rank for rank, lives in alive.items() if lives)
        time.sleep(NOTICE * BEAT)
        if first != self.rank:
            return RankGoneError("")
        if 0 in known and 0 not in alive:
            what = f"rank 0's machine ({known[0].host}) is gone, or can't be reached"
        elif dead:
            what = f"{_named(dead)} of {self.world} {'is' if len(dead) == 1 else 'are'} gone"
        else:
            what = "what started the ranks is gone"
        return RankGoneError(f"{what}. {ADVICE}")

    def _told_to_end(self, number: int, frame: FrameType | None) -> None:
        """At a SIGTERM, of torchrun or of the thread: end as when a person interrupts."""
        if self._ended:
            return
        self._ended = True
        reason = self.reason()
        if reason is not None and not self._severed:
            # whoever looks for what went first must not find this one
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

        Waits so many seconds for the first one to say so by itself, and for it to end; the first
        one itself waits until they have noticed, as it may keep the store.
        """
        if self._severed:
            return
        with suppress(RuntimeError):
            if patience and self._waited(patience):
                return
            content = {"message": message, "input": input_error}
            self._store.set(f"failure/{self.rank}", json.dumps(content))
            self._store.add("failures", 1)
            if patience:
                self._waited(GRACE)
                return
            others = [f"bye/{rank}" for rank in range(self.world) if rank != self.rank]
            until = time.monotonic() + NOTICE * BEAT
            while not self._store.check(others) and time.monotonic() < until:
                time.sleep(0.1)

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
        with suppress(RuntimeError):
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
        last = threading.Timer(ENDING, os._exit, (1,))  # whatever the store does
        last.daemon = True
        last.start()


def _named(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


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
