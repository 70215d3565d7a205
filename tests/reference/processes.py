"""Some work on several processes that are forked from the test's own."""

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.link import Link
from secateur.ranks import Ranks

PATIENCE = 50  # seconds: less than the minute in which a run has to end

forked = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods() or sys.platform == "darwin",
    reason="processes are forked here",
)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _be(rank: int, world: int, port: int, folder: Path, job: Callable[[Ranks], Any]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    try:
        link = Link.from_environment()
        torch.save(job(Ranks(link)), folder / f"{rank}.pt")
        link.meet()
        link.leave()
    except BaseException as error:
        traceback.print_exc()
        (folder / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")
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
