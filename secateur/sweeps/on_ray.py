"""Runs as tasks of Ray, on this machine or on a cluster whose machines share the folders."""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.sweeps.job import Job, perform
from secateur.sweeps.local import Outcome, scheduled
from secateur.utils.errors import InputError, first_line
from secateur.utils.progress import Progress
from secateur.version import __version__

LOCAL = "local"
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # its warning about what will change
    "RAY_DEDUP_LOGS": "0",
}


@dataclass(frozen=True)
class Cluster:
    """The address of Ray, and the resources per run.

    Attributes:
        address: of a cluster, or "local" for one that lasts as long as the sweep.
        cpus: cores a run.
        gpus: GPUs a run; None is one where the cluster has some, unless the CPU was asked for.
    """

    address: str = LOCAL
    cpus: int = 1
    gpus: float | None = None


def load() -> Any:
    """Import Ray.

    Raises:
        InputError: it is not installed.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise InputError('--ray: pip install "secateur[ray]", or leave it out.') from error
    return ray


def on_ray(jobs: Sequence[Job], progress: Progress, cluster: Cluster) -> Iterator[Outcome]:
    """Run each job as a task, as many at a time as the cluster has resources for.

    Raises:
        InputError: no Ray, no cluster at the address, or none of its machines is large enough.
    """
    ray = load()
    own = {"include_dashboard": False} if cluster.address == LOCAL else {}
    progress.say("starting Ray" if own else f"connecting to Ray at {cluster.address}")
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(f"--ray {cluster.address}: {first_line(error)}") from error
    try:
        wanted = _wanted(ray, cluster, jobs)
        task = ray.remote(max_retries=0, **wanted)(_task)
        errors = ray.exceptions.RayError

        def start(job: Job) -> Any:
            progress.say(f"{job.name}: handed to Ray")
            return task.remote(job, str(Path.cwd()), __version__)

        def first_done(running: list[Any]) -> tuple[Any, str | None]:
            (handle, *_), _rest = ray.wait(running, num_returns=1)
            try:
                return handle, ray.get(handle)
            except errors as error:
                return handle, f"its task ended without an answer: {first_line(error)}"

        yield from scheduled(jobs, start, first_done, len(jobs))
    finally:
        ray.shutdown()


def _wanted(ray: Any, cluster: Cluster, jobs: Sequence[Job]) -> dict[str, float]:
    """The resources of each task.

    Raises:
        InputError: no machine has as much, and tasks would wait for ever.
    """
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = cluster.gpus
    if gpus is None:
        some = any(machine.get("GPU", 0) >= 1 for machine in machines)
        gpus = 1 if some and jobs[0].config.settings.device != "cpu" else 0
    wanted = {"num_cpus": cluster.cpus, "num_gpus": gpus}
    if not any(m.get("CPU", 0) >= cluster.cpus and m.get("GPU", 0) >= gpus for m in machines):
        most = max((m.get("CPU", 0) for m in machines), default=0)
        raise InputError(
            f"--cpus {cluster.cpus}, --gpus {gpus:g}: no machine of the cluster has as many; the "
            f"largest has {most:g} cores."
        )
    return wanted


def _task(job: Job, folder: str, version: str) -> str | None:
    """The function of a worker; paths are relative to ``folder``."""
    if version != __version__:
        return f"its machine has Secateur {__version__}, and the sweep was typed on {version}."
    try:
        os.chdir(folder)
    except OSError as error:
        return f"its machine has no folder {folder!r} ({error.strerror}); the machines share it."
    return perform(job, Progress())
