"""Runs on this machine, one after the other or in parallel processes."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TextIO, TypeVar

from secateur.sweeps.job import Job, perform
from secateur.utils.progress import Progress

PATIENCE = 10  # seconds that an interrupted process has to put its things in order
Handle = TypeVar("Handle")
Outcome = tuple[Job, str | None]


def one_by_one(jobs: Sequence[Job], progress: Progress) -> Iterator[Outcome]:
    """Run all jobs in this process, in order."""
    for number, job in enumerate(jobs, 1):
        progress.say(f"run {number} of {len(jobs)}: {job.name}")
        yield job, perform(job, progress)


def scheduled(
    jobs: Sequence[Job],
    start: Callable[[Job], Handle],
    first_done: Callable[[list[Handle]], tuple[Handle, str | None]],
    most: int,
) -> Iterator[Outcome]:
    """Run at most so many jobs at a time, each when the jobs it depends on have finished or
    failed.
    """
    waiting, names = list(jobs), {job.name for job in jobs}
    done = {name for job in jobs for name in job.after} - names
    running: dict[Handle, Job] = {}
    while waiting or running:
        ready = [job for job in waiting if job.after <= done]
        for job in ready[: most - len(running)]:
            running[start(job)] = job
            waiting.remove(job)
        handle, outcome = first_done([*running])
        job = running.pop(handle)
        done.add(job.name)
        yield job, outcome


def side_by_side(
    jobs: Sequence[Job], progress: Progress, most: int, logs: Path
) -> Iterator[Outcome]:
    """Run each job in its own process, with its other output in a file in ``logs``."""
    context = get_context("spawn")
    processes: dict[Any, tuple[Any, Connection, Path]] = {}
    answers: dict[Any, Any] = {}  # connection → sentinel
    logs.mkdir(parents=True, exist_ok=True)

    def start(job: Job) -> int:
        log, (ours, theirs) = logs / f"{job.name}.txt", context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(job, theirs, log))
        process.start()
        theirs.close()
        processes[process.sentinel] = process, ours, log
        answers[ours] = process.sentinel
        progress.say(f"{job.name}: started")
        return process.sentinel

    def first_done(running: list[int]) -> tuple[int, str | None]:
        ready: Any = wait([*running, *answers])[0]  # it may have more to say than a pipe holds
        sentinel = answers.get(ready, ready)
        process, ours, log = processes.pop(sentinel)
        del answers[ours]
        try:
            if ready != ours and not ours.poll():
                raise EOFError
            answer: str | None = ours.recv()
            process.join()
        except (EOFError, OSError):
            process.join()
            killed = process.exitcode == -signal.SIGKILL
            reason = "probably for want of memory" if killed else f"see {str(log)!r}"
            answer = f"its process ended without an answer ({process.exitcode}), {reason}."
        ours.close()
        return sentinel, answer

    with _threads(most):
        try:
            yield from scheduled(jobs, start, first_done, most)
        finally:
            _end([process for process, *_ in processes.values()])


def _end(processes: list[Any]) -> None:
    """Interrupt running processes, so that they keep their finished stages."""
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, signal.SIGINT)
    for process in processes:
        process.join(PATIENCE)
        process.kill()


@contextmanager
def _threads(most: int) -> Iterator[None]:
    """Give each process its share of the cores, unless threads are already limited."""
    name = "OMP_NUM_THREADS"
    if name in os.environ:
        yield
        return
    os.environ[name] = str(max(1, (os.cpu_count() or 1) // most))
    try:
        yield
    finally:
        del os.environ[name]


class NamedProgress(Progress):
    """Messages that start with the name of their run."""

    def __init__(self, name: str, file: TextIO) -> None:
        self.name, self.file = name, file

    def say(self, message: str) -> None:
        """Print one line."""
        print(f"{self.name}: {message}", file=self.file, flush=True)


def _child(job: Job, answer: Connection, log: Path) -> None:
    """The child process. It ends with its parent and does not inherit the lock."""
    threading.Thread(target=_watch, daemon=True).start()
    told = os.fdopen(os.dup(2), "w")
    with log.open("w") as file:
        os.dup2(file.fileno(), 2)
        try:
            answer.send(perform(job, NamedProgress(job.name, told)))
        except KeyboardInterrupt:
            sys.exit(130)


def _watch() -> None:
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
