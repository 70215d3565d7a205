"""How ranks start together, and what is said where one of them, or what joins them, is lost."""

import os
import signal
import socket
import time
from datetime import timedelta

import pytest
import torch

from secateur.cli.outcome import Outcome
from secateur.distributed import liveness, rendezvous
from secateur.distributed.liveness import Liveness, Peer
from tests.support.processes import forked, serving, together

pytestmark = forked


def stop(process, number):
    os.kill(process.pid, number)


@pytest.mark.parametrize("keeper", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize(
    "hosts",
    ["aaa", "abb", "bbab"],  # each machine says it, in a terminal of its own
)
def test_the_leader_is_killed_and_what_keeps_the_store_is_lost(tmp_path, hosts, keeper):
    with serving(hosts, tmp_path) as run:
        run.until_joined()
        stop(run.keeper, keeper)
        stop(run.ranks[0], signal.SIGKILL)
        codes, said = run.ended(0)
    assert set(codes) == {1}
    count = len({*hosts[1:]})
    assert said.count("error: ") == count
    assert said.count(f"error: rank 0 of {len(hosts)} is gone") == count
    assert said.count(f"killed on {hosts[0]}") == count
    assert said.count("Type the command again") == count


@pytest.mark.parametrize("keeper", [signal.SIGKILL, signal.SIGSTOP])
def test_the_leader_is_killed_while_others_still_join(tmp_path, monkeypatch, keeper):
    """The mistake: what c10d says of a lost store stands for what has happened."""
    own = rendezvous.dist.init_process_group

    def late(*given, rank, **options):
        if rank == 0:
            (tmp_path / "leader").touch()
            time.sleep(1000)
        while not (tmp_path / "killed").exists():
            time.sleep(0.05)
        own(*given, rank=rank, **{**options, "timeout": timedelta(seconds=5)})

    monkeypatch.setattr(rendezvous.dist, "init_process_group", late)
    with serving("aaa", tmp_path) as run:
        run.until("leader")
        stop(run.keeper, keeper)
        stop(run.ranks[0], signal.SIGKILL)
        run.ranks[0].join()
        (tmp_path / "killed").touch()
        codes, said = run.ended(0)
    assert set(codes) == {1}
    assert said.count("error: ") == 1
    assert "error: rank 0 of 3 is gone" in said
    assert "can't join" not in said
    assert "Traceback" not in said


def test_nothing_depends_on_the_store_once_all_have_joined(tmp_path):
    def work(ranks):
        ranks.barrier()
        if ranks.leader:
            os.kill(int((tmp_path / "keeper").read_text()), signal.SIGKILL)
        ranks.barrier()
        ranks.all_gather(ranks.rank)
        return Outcome(0)

    with serving("aab", tmp_path, work=work) as run:
        codes, said = run.ended()
    assert codes == [0, 0, 0]
    assert said == ""


def test_limits_together_are_below_a_minute():
    limits = liveness.KEEPALIVE
    silence = limits["TCP_KEEPIDLE"] + limits["TCP_KEEPINTVL"] * limits["TCP_KEEPCNT"]
    assert silence + liveness.ORDER + liveness.GRACE < 60


@pytest.mark.skipif(not hasattr(socket, "TCP_KEEPIDLE"), reason="named so on Linux")
def test_the_kernel_asks_whether_the_other_machine_is_there():
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        other, _ = server.accept()
    with one, other:
        Peer(one, 1, "a")
        assert one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        for name, value in liveness.KEEPALIVE.items():
            assert one.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) == value


def test_a_machine_that_does_not_answer_is_named(tmp_path):
    def lost(ranks):
        class Silent:
            def recv(self, _):
                raise TimeoutError(110, "Connection timed out")

        if ranks.leader:
            ranks.liveness.peers[1].host = "far"
            ranks.liveness.peers[1].connection, kept = Silent(), ranks.liveness.peers[1].connection
            ranks.liveness.peers[1].read()
            said = str(ranks.liveness.trouble())
            ranks.liveness.peers[1].connection = kept
            return said
        time.sleep(40)
        return ""

    said, _ = together(2, lost, tmp_path)
    assert "rank 1 of 2 can't be reached: the network or the machine far failed" in said


def test_a_process_that_was_stopped_goes_on(tmp_path, monkeypatch):
    """The mistake: one that says nothing for a while counts as gone."""
    monkeypatch.setitem(liveness.KEEPALIVE, "TCP_KEEPIDLE", 1)
    monkeypatch.setitem(liveness.KEEPALIVE, "TCP_KEEPINTVL", 1)
    monkeypatch.setitem(liveness.KEEPALIVE, "TCP_KEEPCNT", 1)

    def work(ranks):
        (tmp_path / f"{ranks.rank}.at work").touch()
        while not (tmp_path / "enough").exists():
            time.sleep(0.05)
        return Outcome(sum(ranks.all_gather(1)) - 2)

    with serving("aa", tmp_path, work=work) as run:
        run.until("0.at work", "1.at work")
        stop(run.ranks[1], signal.SIGSTOP)
        run.ranks[1].join(4)
        stop(run.ranks[1], signal.SIGCONT)
        (tmp_path / "enough").touch()
        codes, said = run.ended()
    assert codes == [0, 0]
    assert said == ""


@pytest.mark.parametrize(
    ("missing", "expected"),
    [((1,), "rank 1 of 3 has not started"), ((0, 2), "ranks 0, 2 of 3 have not started")],
)
def test_one_that_never_starts_is_not_waited_for_without_end(
    tmp_path, monkeypatch, missing, expected
):
    monkeypatch.setattr(rendezvous, "JOINING", timedelta(seconds=3))
    with serving("aaa", tmp_path, missing) as run:
        codes, said = run.ended()
    assert set(codes) == {2}
    assert said.count("error: ") == 1
    assert f"error: {expected} within 0.05 minutes" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("failing", [0, 1])
def test_what_keeps_one_from_joining_is_said_once(tmp_path, monkeypatch, failing):
    """No traceback, and the others don't take it for dead."""
    own = rendezvous.dist.init_process_group

    def refused(*given, rank, **options):
        if rank == failing:
            raise rendezvous.dist.DistStoreError("no such network")
        own(*given, rank=rank, **options)

    monkeypatch.setattr(rendezvous.dist, "init_process_group", refused)
    monkeypatch.setattr(liveness, "EXPLANATION", 1.0)
    monkeypatch.setattr(liveness, "GRACE", 3.0)
    with serving("aaa", tmp_path) as run:
        codes, said = run.ended()
    assert set(codes) <= {1, 2}
    assert said.count("error: ") == 1
    assert f"error: rank {failing} of 3 can't join the others (no such network)" in said
    assert "Traceback" not in said


def test_one_that_has_left_is_not_gone(tmp_path):
    """The mistake: whoever is slower takes the others, who are done, for dead."""

    def left(ranks):
        ranks.barrier()
        leave, ranks.barrier = ranks.liveness.leave, lambda: None  # nobody waits for the slow one
        if not ranks.leader:
            leave()
            return "left"
        time.sleep(2)  # the other has ended by now, or says nothing
        found = ranks.liveness.trouble()
        return "there" if found is None else str(found)

    assert together(2, left, tmp_path) == ["there", "left"]


def test_what_is_said_of_a_lost_rank_goes_before_what_the_ended_ones_say():
    """The mistake: the first that is heard of is taken for the first that ended."""
    peers = {}
    for rank in (1, 2, 3):
        peers[rank] = object.__new__(Peer)
        peers[rank].rank, peers[rank].host = rank, "a"
        peers[rank].gone, peers[rank].unreachable, peers[rank].said = False, False, None
    found = object.__new__(Liveness)
    found.rank, found.world_size, found.peers, found.speaks = 0, 4, peers, False
    found._parent = os.getppid()
    assert found._judged() is None
    peers[1].said = {"failed": "rank 1 was interrupted", "bad_input": False, "terminated": True}
    assert str(found._judged()) == "rank 1 was interrupted"
    peers[2].said = {"failed": "no such file", "bad_input": True, "terminated": False}
    assert repr(found._judged()) == "RankFailedError('no such file')"
    peers[3].gone = True
    assert str(found._judged()).startswith("rank 3 of 4 is gone")
    found._parent = -1
    assert "torchrun" in str(found._judged())


def test_a_machine_without_a_gpu_is_named(tmp_path):
    def settled(ranks):
        torch.cuda.device_count = lambda: 0
        ranks.use_device("cuda")

    said = together(2, settled, tmp_path)
    assert said[0].startswith("InputError: rank 0 finds no GPU on ")
