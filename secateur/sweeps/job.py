"""One run of a sweep, as plain data that another process can be given."""

from dataclasses import dataclass
from pathlib import Path

from secateur.cli import parse as asked
from secateur.data.tokens import Calibration
from secateur.evaluate.evaluator import Questions, quiet
from secateur.io.run_directory import UnfinishedRunError
from secateur.models.model import Settings
from secateur.pipeline.compress import compress
from secateur.pipeline.multi_step import compress_in_steps
from secateur.planning.recipe import Recipe
from secateur.sweeps.order import in_steps
from secateur.utils.errors import InputError, RunError, first_line, out_of_memory, words
from secateur.utils.progress import Progress


@dataclass(frozen=True)
class Job:
    """What one run is given.

    Attributes:
        name: of its folder.
        after: the runs that should be done before it.
        command: the command line that asked for it.
    """

    name: str
    recipe: Recipe
    source: str
    out: Path
    calibration: Calibration
    questions: Questions
    settings: Settings
    shared: Path
    statistics: Path | None = None
    after: frozenset[str] = frozenset()
    command: str | None = None


def perform(job: Job, progress: Progress) -> str | None:
    """Do a run; the answer says why it could not be done, None that it was."""
    quiet()  # the process may be another one
    given = (job.calibration, job.questions, job.settings)
    token = asked.COMMAND.set(job.command)
    try:
        if in_steps(job.recipe):
            compress_in_steps(
                job.source, job.out, job.recipe, *given, progress=progress, shared=job.shared
            )
        else:
            (step,) = job.recipe.steps
            compress(
                job.source,
                job.out,
                step.method,
                *given,
                step.goal,
                step.allocator,
                statistics=job.statistics,
                progress=progress,
                shared=job.shared,
            )
    except UnfinishedRunError as error:
        hidden = job.out.with_name(f".{job.name}.partial")
        return f"{str(error).partition('. ')[0]}. Remove {str(hidden)!r} to start it afresh."
    except (InputError, RunError) as error:
        return str(error)
    except OSError as error:
        return f"{words(first_line(error))}. What it had finished is kept."
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return "there is not enough memory; --stream on takes less. What it had finished is kept."
    finally:
        asked.COMMAND.reset(token)
    return None
