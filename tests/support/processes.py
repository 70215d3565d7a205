"""Some work on several processes that are forked from the test's own."""

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from secateur.cli.launch import run_ranks
from secateur.cli.outcome import Outcome
from secateur.distributed.collectives import Ranks
from secateur.distributed.rendezvous import join, leave

PATIENCE = 50  # seconds: less than the minute in which a run has to end

forked = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods() or sys.platform == "darwin",
    reason="processes are forked here",
)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _number(rank: int, world: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}


def _be(rank: int, world: int, port: int, folder: Path, job: Callable[[Ranks], Any]) -> None:
    _number(rank, world, port)
    ranks: Ranks | None = None
    try:
        ranks = join()
        torch.save(job(ranks), folder / f"{rank}.pt")
        leave(ranks)
    except BaseException as error:
        traceback.print_exc()
        (folder / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")
        if ranks is not None:
            ranks.liveness.fail("", False)
    os._exit(0)


def together(world: int, job: Callable[[Ranks], Any], folder: Path) -> list[Any]:
    """What ``job`` gives in each of so many processes; as text where it raised, None if it died."""
    port, context = free_port(), multiprocessing.get_context("fork")
    given = [(rank, world, port, folder, job) for rank in range(world)]
    started = [context.Process(target=_be, args=own) for own in given]
    for process in started:
        process.start()
    for process in started:
        process.join(PATIENCE)
    late = [process for process in started if process.is_alive()]
    for process in late:
        process.kill()
    assert not late
    return [_left(folder, rank) for rank in range(world)]


def _left(folder: Path, rank: int) -> Any:
    found, said = folder / f"{rank}.pt", folder / f"{rank}.txt"
    if said.exists():
        return said.read_text()
    return torch.load(found, weights_only=False) if found.exists() else None


@dataclass
class Run:
    """Ranks of the command line at work, and the process with the store that they meet by."""

    keeper: ForkProcess
    ranks: dict[int, ForkProcess]
    folder: Path

    def until(self, *names: str) -> None:
        """Wait until the ranks have made files of these names."""
        until = time.monotonic() + PATIENCE
        while not all((self.folder / name).exists() for name in names):
            assert time.monotonic() < until
            time.sleep(0.05)

    def until_joined(self) -> None:
        """Wait until all have joined."""
        self.until(*(f"{rank}.joined" for rank in self.ranks))

    def ended(self, *but: int) -> tuple[list[int | None], str]:
        """Exit codes of all but some, and all that they said."""
        others = [rank for number, rank in self.ranks.items() if number not in but]
        until = time.monotonic() + PATIENCE
        for rank in others:
            rank.join(max(0.0, until - time.monotonic()))
        assert not any(rank.is_alive() for rank in others)
        said = "".join(path.read_text() for path in sorted(self.folder.glob("*.said")))
        return [rank.exitcode for rank in others], said


def _keep(port: int, folder: Path) -> None:
    (folder / "keeper").write_text(str(os.getpid()))
    kept = dist.TCPStore("127.0.0.1", port, None, True, wait_for_workers=False)
    time.sleep(1000)
    del kept


Work = Callable[[Ranks], Outcome]


def _serve(rank: int, hosts: Sequence[str], port: int, folder: Path, work: Work) -> None:
    _number(rank, len(hosts), port)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    os.dup2(os.open(folder / f"{rank}.said", os.O_WRONLY | os.O_CREAT), 2)
    sys.stderr = os.fdopen(2, "w")
    socket.gethostname = lambda: hosts[rank]

    def joined(ranks: Ranks) -> Outcome:
        (folder / f"{rank}.joined").touch()
        try:
            return work(ranks)
        except KeyboardInterrupt as error:  # as the command line does
            return Outcome(1, str(error))

    os._exit(run_ranks(joined))


def busy(ranks: Ranks) -> Outcome:
    """Work that takes long."""
    time.sleep(1000)
    return Outcome(0)


@contextmanager
def serving(
    hosts: Sequence[str], folder: Path, missing: Sequence[int] = (), work: Work = busy
) -> Iterator[Run]:
    """The command line as torchrun starts it: a rank for every name of a machine."""
    port, context = free_port(), multiprocessing.get_context("fork")
    numbers = [rank for rank in range(len(hosts)) if rank not in missing]
    given = {n: (n, hosts, port, folder, work) for n in numbers}
    ranks = {n: context.Process(target=_serve, args=own) for n, own in given.items()}
    run = Run(context.Process(target=_keep, args=(port, folder)), ranks, folder)
    for process in (run.keeper, *ranks.values()):
        process.start()
    try:
        yield run
    finally:
        for process in (run.keeper, *ranks.values()):
            process.kill()
            process.join()
