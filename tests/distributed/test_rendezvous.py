"""What is said where a run of several processes loses what holds it together."""

import os
import signal
import time
from datetime import timedelta

import pytest

from secateur.distributed import rendezvous as link
from tests.support.processes import forked, serving, together

pytestmark = forked


def stop(process, number):
    os.kill(process.pid, number)


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        ("aaa", "rank 0 of 3 is gone"),
        ("abb", "rank 0's machine (a) is gone"),
        ("bbab", "rank 0 of 4 is gone"),  # and so says the other machine, in a terminal of its own
    ],
)
def test_the_first_one_and_what_keeps_the_store_are_killed(tmp_path, hosts, expected):
    with serving(hosts, tmp_path) as run:
        run.until_led()
        stop(run.keeper, signal.SIGKILL)
        stop(run.ranks[0], signal.SIGKILL)
        codes, said = run.ended(0)
    assert set(codes) == {1}
    assert expected in said
    assert said.count("error: ") == len({*hosts[1:]})
    assert said.count("Type the command again") == len({*hosts[1:]})


def test_only_what_keeps_the_store_is_killed(tmp_path):
    with serving("aa", tmp_path) as run:
        run.until_led()
        stop(run.keeper, signal.SIGKILL)
        codes, said = run.ended(0)  # the first one reports what it is interrupted by elsewhere
    assert codes == [1]
    assert "error: " not in said.replace("error: what started the ranks is gone", "")


def test_the_first_machine_is_frozen(tmp_path, monkeypatch):
    """The mistake: a call of a store that never answers has no limit."""
    monkeypatch.setattr(link, "STALL", 4)
    monkeypatch.setattr(link, "GRACE", 3.0)
    with serving("abb", tmp_path) as run:
        run.until_led()
        stop(run.keeper, signal.SIGSTOP)
        stop(run.ranks[0], signal.SIGKILL)
        codes, said = run.ended(0)
    assert codes == [1, 1]
    assert said.count("error: ") == 1
    assert "error: rank 0's machine (a) is gone, or can't be reached" in said


def test_limits_together_are_below_a_minute():
    waited = (link.STALL + 1 + link.NOTICE) * link.BEAT + link.GRACE
    assert max(waited, link.SILENCE + link.BEAT + link.GRACE) < 60


def test_a_process_that_was_stopped_goes_on(tmp_path, monkeypatch):
    """The mistake: seconds in which it was stopped count as the store's silence."""
    monkeypatch.setattr(link, "STALL", 3)

    with serving("aa", tmp_path) as run:
        run.until_led()
        stop(run.ranks[1], signal.SIGSTOP)
        run.ranks[1].join(6)
        stop(run.ranks[1], signal.SIGCONT)
        run.ranks[1].join(3)
        assert all(rank.is_alive() for rank in run.ranks.values())


@pytest.mark.parametrize(
    ("missing", "expected"),
    [((1,), "rank 1 of 3 has not started"), ((0, 2), "ranks 0, 2 of 3 have not started")],
)
def test_one_that_never_starts_is_not_waited_for_without_end(
    tmp_path, monkeypatch, missing, expected
):
    monkeypatch.setattr(link, "JOINING", timedelta(seconds=3))
    with serving("aaa", tmp_path, missing) as run:
        codes, said = run.ended()
    assert set(codes) == {2}
    assert said.count("error: ") == 1
    assert f"error: {expected} within 0.05 minutes" in said
    assert "Traceback" not in said


def test_what_keeps_one_from_joining_is_said_once(tmp_path, monkeypatch):
    """No traceback, and the others don't take it for dead."""
    own = link.dist.init_process_group

    def failing(*given, rank, **options):
        if rank == 1:
            raise link.dist.DistStoreError("no such network")
        own(*given, rank=rank, **options)

    monkeypatch.setattr(link.dist, "init_process_group", failing)
    with serving("aaa", tmp_path) as run:
        codes, said = run.ended()
    assert set(codes) <= {1, 2}
    assert said.count("error: ") == 1
    assert "error: rank 1 of 3 can't join the others (no such network)" in said
    assert "Traceback" not in said


def test_a_store_that_is_gone_when_all_is_done_is_no_error(tmp_path):
    def leaving(ranks):
        class Gone:
            def set(self, *_):
                raise link.dist.DistNetworkError("gone")

            check = add = get = set

        ranks.meet()
        ranks.link._closed.set()
        time.sleep(link.BEAT)  # a look at the others may be under way
        ranks.link._store = Gone()
        ranks.link.leave()
        return "left"

    def job(ranks):
        found = leaving(ranks)
        ranks.link.meet = ranks.link.leave = lambda: None
        return found

    assert together(2, job, tmp_path) == ["left", "left"]


def test_a_machine_without_a_gpu_is_named(tmp_path):
    def settled(ranks):
        link.torch.cuda.device_count = lambda: 0
        ranks.settle("cuda")

    for rank, said in enumerate(together(2, settled, tmp_path)):
        assert said.startswith(f"InputError: rank {rank} finds no GPU on ")
