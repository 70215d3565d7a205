"""One run of a sweep as plain data for another process."""

from dataclasses import dataclass
from pathlib import Path

from secateur.evaluate.evaluator import quiet
from secateur.io.run_directory import UnfinishedRunError
from secateur.pipeline.compress import run
from secateur.pipeline.config import RunConfig
from secateur.pipeline.context import RunContext
from secateur.utils.errors import InputError, RunError, first_line, out_of_memory, words
from secateur.utils.progress import Progress


@dataclass(frozen=True)
class Job:
    """The input of one run.

    Attributes:
        name: of its folder.
        config: what is asked of it.
        shared: folder for what is measured of the dense model.
        after: the runs that should be done before it.
        command: the command line that asked for it.
    """

    name: str
    config: RunConfig
    shared: Path
    after: frozenset[str] = frozenset()
    command: str | None = None


def perform(job: Job, progress: Progress) -> str | None:
    """Run a job; returns None, or why it failed."""
    quiet()  # the process may be another one
    try:
        run(job.config, RunContext(progress, command=job.command, shared=job.shared))
    except UnfinishedRunError as error:
        hidden = Path(job.config.out).with_name(f".{job.name}.partial")
        return f"{str(error).partition('. ')[0]}. Remove {str(hidden)!r} to start it afresh."
    except (InputError, RunError) as error:
        return str(error)
    except OSError as error:
        return f"{words(first_line(error))}. What it had finished is kept."
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return "there is not enough memory; --stream on takes less. What it had finished is kept."
    return None
