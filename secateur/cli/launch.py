"""The command line on several processes: one follows it, the others do what that one orders."""

import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch reads it when it is imported
import torch

from secateur.distributed.collectives import Ranks
from secateur.distributed.rendezvous import ADVICE, Link, RankFailedError, RankGoneError
from secateur.evaluate.evaluator import quiet
from secateur.pipeline.workers import Crew, follow
from secateur.utils.errors import InputError, RunError, out_of_memory

SHARED = ("compress", "plan")
PATIENCE = 3.0  # seconds in which the first one may meet the same error, and say so itself


def joined() -> Link | None:
    """The connection to the others that torchrun has started, or None.

    Raises:
        InputError: they can't be reached, or don't come.
    """
    link = Link.from_environment()
    if link is not None and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // link.neighbours))
    return link


def check_command(name: str | None, crew: Crew | None) -> None:
    """Refuse a command that would leave the other processes idle.

    Raises:
        InputError: no work of it is shared.
    """
    if crew is not None and name not in (None, *SHARED):
        raise InputError(
            f"{name} works in one process; type it without torchrun. Several share the work of "
            f"{' and '.join(SHARED)}."
        )


def serve(link: Link) -> int:
    """Be one of the others; the exit code."""
    quiet()
    message, refused = "", False
    try:
        follow(Ranks(link))
        link.leave()
        return 0
    except RankGoneError as error:
        link.quiet()
        if str(error):
            print(f"error: {error}", file=sys.stderr)
        return 1
    except RankFailedError:
        link.quiet()
        return 1
    except KeyboardInterrupt:
        message = f"rank {link.rank} was interrupted. {ADVICE}"
    except InputError as error:
        message, refused = str(error), True
    except (RunError, OSError) as error:
        message = f"rank {link.rank}: {error}"
    except BaseException as error:
        if isinstance(error, Exception) and out_of_memory(error):
            message = f"rank {link.rank}: there is not enough memory. {ADVICE}"
        else:
            traceback.print_exc()
        message = message or f"rank {link.rank} failed, as it says above."
    link.quiet()
    link.fail(message, refused, PATIENCE)
    return 2 if refused else 1


def run_shared(run: Callable[[Crew | None], int]) -> int:
    """Follow the command line in the first process, and be at its service in the others.

    The exit code; there is none where another process waits for this one in vain.
    """
    try:
        link = joined()
    except RankFailedError:
        return _leaving(2)  # who failed has said it
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return _leaving(2)
    except KeyboardInterrupt as error:
        print(f"error: {error}" if str(error) else "interrupted.", file=sys.stderr)
        return _leaving(1)
    if link is None:
        return run(None)
    if link.rank:
        return _leaving(serve(link))
    try:
        code = run(crew := Crew(Ranks(link)))
    except BaseException:  # nothing that is known; the others must not wait
        traceback.print_exc()
        code = 1
    if code:
        link.quiet()
        link.fail("", False)
    else:
        with suppress(KeyboardInterrupt, InputError):  # all is done, whoever is gone
            crew.dismiss()
            link.leave()
    return _leaving(code)


def _leaving(code: int) -> int:
    """The exit code; what still waits for another process does not keep this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)
    return code
