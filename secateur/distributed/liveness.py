"""Which ranks are still there, and why one has ended.

``torch.distributed`` tells only a rank that waits that a connection broke, and not which rank has
ended. So every rank holds one connection with the leader for as long as it runs. The kernel closes
it when the process ends, however it ends, and gives it up when the other machine stops answering.
A process that is busy, or stopped for a while, is not taken for dead: nothing has to be sent.
"""

import json
import os
import selectors
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from types import FrameType
from typing import Any

from secateur.utils.errors import InputError

#: seconds without traffic until the kernel probes a connection, between probes, and how many fail
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
GRACE = 15.0  #: seconds for a rank to end by itself, when another has ended
EXPLANATION = 20.0  #: most seconds between a connection that breaks and the reason for it
BEAT = 1.0  #: seconds between two looks at what has started the leader
ORDER = 1.0  #: seconds by which what two machines say may arrive in another order
ADVICE = "Type the command again; compress then goes on."


class RankGoneError(KeyboardInterrupt):
    """Another rank has ended; what is finished stays, as when a person interrupts.

    Its message is empty where another rank says it.
    """


class RankFailedError(InputError):
    """Another rank was given input that it can't use, and its message says what."""


class Peer:
    """The connection with another rank.

    Attributes:
        rank: its number.
        host: the name of its machine.
        gone: whether it ended without a word.
        said: the last message of a rank that has failed, or is done.
    """

    def __init__(self, connection: socket.socket, rank: int, host: str) -> None:
        self.connection, self.rank, self.host = connection, rank, host
        self.gone = self.unreachable = False
        self.said: dict[str, Any] | None = None
        self._rest = b""
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    @property
    def open(self) -> bool:
        """Whether more is to be expected of it."""
        return not self.gone and self.said is None

    def send(self, **message: Any) -> None:
        """Send a message; a rank that is gone need not have it."""
        with suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def read(self) -> None:
        """Take what has come from it."""
        try:
            content = self.connection.recv(2**16)
        except TimeoutError:
            content, self.unreachable = b"", True
        except OSError:
            content = b""
        self._rest += content
        line, ended, _ = self._rest.partition(b"\n")
        if ended:
            self.said = json.loads(line)
        elif not content:
            self.gone = True


class Liveness:
    """A thread that ends this process when another rank has ended.

    The leader has a connection with every rank, and the others one with the leader. Where a rank is
    gone, or fails, the leader has the message and says so; where the leader is gone, the first rank
    of each machine that is left says it.

    Args:
        rank: number of this process.
        world_size: how many ranks there are.
        peers: the connections.
        speaks: whether this rank says that the leader is gone.
    """

    def __init__(self, rank: int, world_size: int, peers: Mapping[int, Peer], speaks: bool) -> None:
        self.rank, self.world_size, self.peers, self.speaks = rank, world_size, peers, speaks
        self.ending = False  # this process is about to end, and needs no reason for it any more
        self._parent = os.getppid()
        self._trouble: BaseException | None = None
        self._reading = threading.RLock()
        self._found, self._closed = threading.Event(), threading.Event()
        signal.signal(signal.SIGTERM, self._terminated)
        threading.Thread(target=self._watch, daemon=True).start()

    def trouble(self) -> BaseException | None:
        """Why this process can't go on, as far as it is known now."""
        with self._reading:
            if self._trouble is None:
                self._read(0)
                if self._only_terminated():  # by torchrun, because of a rank that has ended
                    self._read(ORDER)
                self._trouble = self._judged()
            return self._trouble

    def explained(self, otherwise: str) -> BaseException:
        """Why a connection broke; the thread may still be about to learn that."""
        self._found.wait(EXPLANATION)
        self.ending = True
        text = f"the connection to the other ranks broke ({otherwise}). {ADVICE}"
        return self.trouble() or RankGoneError(text)

    def fail(self, message: str, bad_input: bool, terminated: bool = False) -> None:
        """Tell the others that this rank can't go on; the leader says why, and all end.

        ``terminated`` is for a rank that was told to end. This process has to end from now on.
        """
        self.ending = True
        self._closed.set()
        for peer in self.peers.values():
            peer.send(failed=message, bad_input=bad_input, terminated=terminated)
        last = threading.Timer(GRACE, os._exit, (1,))
        last.daemon = True
        last.start()

    def leave(self) -> None:
        """Part from the others when all is done."""
        self.ending = True
        self._closed.set()
        for peer in self.peers.values():
            peer.send(done=True)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _watch(self) -> None:
        while not self._closed.is_set():
            with selectors.DefaultSelector() as selector:
                expected = [peer for peer in self.peers.values() if peer.open]
                for peer in expected:
                    selector.register(peer.connection, selectors.EVENT_READ)
                if not expected:
                    return
                selector.select(BEAT)
            if (trouble := self.trouble()) is not None:
                self._found.set()
                self._end(trouble)
                return

    def _read(self, timeout: float) -> None:
        """Take what has come from all others."""
        with selectors.DefaultSelector() as selector:
            for peer in self.peers.values():
                if peer.open:
                    selector.register(peer.connection, selectors.EVENT_READ, peer)
            for key, _ in selector.select(timeout):
                key.data.read()

    @property
    def _failed(self) -> list[dict[str, Any]]:
        """What ranks have said that failed; first those that were not told to end."""
        said = [peer.said for peer in self.peers.values() if peer.said is not None]
        failed = [message for message in said if "failed" in message]
        return sorted(failed, key=lambda message: bool(message["terminated"]))

    def _only_terminated(self) -> bool:
        gone = any(peer.gone for peer in self.peers.values())
        return not gone and bool(self._failed) and bool(self._failed[0]["terminated"])

    def _judged(self) -> BaseException | None:
        """What the ends of other ranks mean for this process."""
        if self.rank == 0 and os.getppid() != self._parent:
            return RankGoneError(f"torchrun, which started rank 0, is gone. {ADVICE}")
        gone = [peer for peer in self.peers.values() if peer.gone]
        if gone:  # before what is said of ranks that were ended because of it
            return RankGoneError(self._loss(gone) if self.rank == 0 or self.speaks else "")
        if not self._failed:
            return None
        first = self._failed[0]
        kind = RankFailedError if first["bad_input"] else RankGoneError
        return kind(str(first["failed"]))

    def _loss(self, gone: list[Peer]) -> str:
        named, host = ", ".join(str(peer.rank) for peer in gone), gone[0].host
        one = len(gone) == 1
        subject = f"rank {named} of {self.world_size}" if one else f"ranks {named}"
        if any(peer.unreachable for peer in gone):
            return f"{subject} can't be reached: the network or the machine {host} failed. {ADVICE}"
        state = "is gone: it was killed" if one else "are gone: they were killed"
        return f"{subject} {state} on {host}, perhaps for want of memory. {ADVICE}"

    def _end(self, trouble: BaseException) -> None:
        """Let this process end as when it is interrupted, and by force where it does not."""
        if self.rank == 0:
            for peer in self.peers.values():
                bad_input = isinstance(trouble, RankFailedError)
                peer.send(failed="", bad_input=bad_input, terminated=False)
        if self.ending:
            return
        os.kill(os.getpid(), signal.SIGTERM)
        if not self._closed.wait(GRACE):
            if str(trouble):
                print(f"error: {trouble}", file=sys.stderr, flush=True)
            os._exit(1)

    def _terminated(self, number: int, frame: FrameType | None) -> None:
        """At a SIGTERM, of torchrun or of the thread: end as when a person interrupts."""
        if self.ending:
            return
        self.ending = True
        raise self.trouble() or KeyboardInterrupt
