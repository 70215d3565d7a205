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

from secateur.cli.launch import run_shared
from secateur.distributed.collectives import Ranks
from secateur.distributed.rendezvous import Link
from secateur.pipeline.workers import Crew

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
    link: Link | None = None
    try:
        link = Link.from_environment()
        torch.save(job(Ranks(link)), folder / f"{rank}.pt")
        link.meet()
        link.leave()
    except BaseException as error:
        traceback.print_exc()
        (folder / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")
        if link is not None and not rank:  # as the first one ends, who keeps the store
            link.quiet()
            link.fail("", False)
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
    """Ranks of the command line whose first one is at work, and the store that they meet by."""

    keeper: ForkProcess
    ranks: dict[int, ForkProcess]
    folder: Path

    def until_led(self) -> None:
        """Wait until all have joined."""
        until = time.monotonic() + PATIENCE
        while not (self.folder / "led").exists():
            assert time.monotonic() < until
            time.sleep(0.05)

    def ended(self, *but: int) -> tuple[list[int | None], str]:
        """Exit codes of all but some, and all that they said."""
        others = [rank for number, rank in self.ranks.items() if number not in but]
        until = time.monotonic() + PATIENCE
        for rank in others:
            rank.join(max(0.0, until - time.monotonic()))
        assert not any(rank.is_alive() for rank in others)
        said = "".join(path.read_text() for path in sorted(self.folder.glob("*.said")))
        return [rank.exitcode for rank in others], said


def _keep(port: int) -> None:
    kept = dist.TCPStore("127.0.0.1", port, None, True, wait_for_workers=False)
    time.sleep(1000)
    del kept


def _serve(rank: int, hosts: Sequence[str], port: int, folder: Path) -> None:
    _number(rank, len(hosts), port)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    os.dup2(os.open(folder / f"{rank}.said", os.O_WRONLY | os.O_CREAT), 2)
    sys.stderr = os.fdopen(2, "w")
    socket.gethostname = lambda: hosts[rank]

    def lead(crew: Crew | None) -> int:
        (folder / "led").touch()
        time.sleep(1000)
        return 0

    os._exit(run_shared(lead))


@contextmanager
def serving(hosts: Sequence[str], folder: Path, missing: Sequence[int] = ()) -> Iterator[Run]:
    """The command line as torchrun starts it: a rank for every name of a machine."""
    port, context = free_port(), multiprocessing.get_context("fork")
    numbers = [rank for rank in range(len(hosts)) if rank not in missing]
    ranks = {n: context.Process(target=_serve, args=(n, hosts, port, folder)) for n in numbers}
    run = Run(context.Process(target=_keep, args=(port,)), ranks, folder)
    for process in (run.keeper, *ranks.values()):
        process.start()
    try:
        yield run
    finally:
        for process in (run.keeper, *ranks.values()):
            process.kill()
            process.join()
