"""The command line under torchrun: every rank follows it, and the leader alone speaks."""

import os
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout, suppress

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch reads it when it is imported
import torch

from secateur.cli.outcome import Outcome
from secateur.distributed.collectives import Ranks
from secateur.distributed.liveness import RankFailedError
from secateur.distributed.rendezvous import join, leave
from secateur.utils.errors import InputError

SHARED = ("compress", "plan")


def check_command(name: str | None, ranks: Ranks) -> None:
    """Refuse a command that would leave the other ranks idle.

    Raises:
        InputError: no work of it is shared.
    """
    if not ranks.alone and name not in (None, *SHARED):
        raise InputError(
            f"{name} works in one process; type it without torchrun. Several share the work of "
            f"{' and '.join(SHARED)}."
        )


def run_ranks(run: Callable[[Ranks], Outcome]) -> int:
    """Follow the command line as one of the ranks that torchrun has started; the exit code.

    An error of one rank ends all of them, with one message. There is no return where another rank
    may be waiting for this one in vain: the process then ends here.
    """
    try:
        ranks = join()
    except RankFailedError:
        return _exit(2)  # another rank has said it
    except InputError as error:
        return _exit(Outcome(2, str(error)).show())
    except KeyboardInterrupt as error:
        return _exit(Outcome(1, str(error)).show())
    if ranks.alone:
        return run(ranks).show()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks.local_world_size))
    if not ranks.leader:
        warnings.simplefilter("ignore")
    try:
        with redirect_stdout(sys.stdout if ranks.leader else None):
            outcome = run(ranks)
        if not outcome.code and not ranks.leader:
            leave(ranks)  # once the leader has come to its end
    except KeyboardInterrupt as error:
        outcome = Outcome(1, str(error))
    except BaseException:  # nothing that is known; the others must not wait
        traceback.print_exc()
        outcome = Outcome(1, f"rank {ranks.rank} failed, as it says above.")
    if outcome.code:
        return _exit(_failed(ranks, outcome))
    if ranks.leader:
        with suppress(KeyboardInterrupt):  # all is done, whoever is gone
            leave(ranks)
    return 0


def _failed(ranks: Ranks, outcome: Outcome) -> int:
    """Say why this rank can't go on, or let the leader say it."""
    assert ranks.liveness is not None
    if ranks.leader:
        outcome.show()
        ranks.liveness.fail("", outcome.code == 2)
    elif (trouble := ranks.liveness.trouble()) is not None:
        if str(trouble):
            Outcome(outcome.code, str(trouble)).show()
    else:
        interrupted = f"rank {ranks.rank} of {ranks.world_size} was interrupted."
        message = outcome.message or interrupted
        ranks.liveness.fail(message, outcome.code == 2, terminated=not outcome.message)
    return outcome.code


def _exit(code: int) -> int:
    """The exit code; what still waits for another rank does not keep this process."""
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)
    return code
