"""One case under watch: how long it takes, how much memory, and what else it does."""

import gc
import resource
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

from secateur.utils.errors import InputError
from tests.fuzz.targets import Target

SECONDS = 20.0  # that one case may take
MEMORY = 2**30  # bytes that the process may grow by
MESSAGE = 6000
#: what changes folders: places among its arguments of paths, and of the folders they start from
WRITES = {
    **{"os.mkdir": {0: 2}, "os.remove": {0: 1}, "os.rmdir": {0: 1}, "os.truncate": {0: None}},
    **{"os.rename": {0: 2, 1: 3}, "os.link": {1: 3}, "os.symlink": {1: 2}},
}
NEVER = ("pickle.find_class", "marshal.load", "marshal.loads", "socket.connect", "subprocess.Popen")


class TookTooLongError(BaseException):
    """Raised by the clock; no handler of errors takes it."""


@dataclass
class Watch:
    """Sees what is opened, run and sent while a case is read.

    Attributes:
        room: where files may be written.
        faults: what happened that must not.
    """

    room: Path
    faults: list[str] = field(default_factory=list)
    active: bool = False

    def __post_init__(self) -> None:
        sys.addaudithook(self._seen)  # stays until the process ends

    def _seen(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event in NEVER and not _within_import():
            self.faults.append(f"{event} {str(arguments)[:200]}")
        elif event == "open" and _writes(arguments) and self._outside(arguments[0]):
            self.faults.append(f"wrote {arguments[0]!r}")
        elif event in WRITES:
            for path, start in WRITES[event].items():
                if self._outside(arguments[path], -1 if start is None else arguments[start]):
                    self.faults.append(f"{event} {arguments!r}")
        elif event == "exec" and self._stranger(getattr(arguments[0], "co_filename", "")):
            self.faults.append(f"ran {arguments[0].co_filename!r}")

    def _outside(self, path: Any, start: int = -1) -> bool:
        if not isinstance(path, str | bytes | Path):
            return False  # a descriptor that was opened before
        own = Path(path.decode() if isinstance(path, bytes) else path)
        found = (own if start < 0 else Path(f"/proc/self/fd/{start}").resolve() / own).resolve()
        return not found.is_relative_to(self.room) and found != Path("/dev/null")

    def _stranger(self, path: str) -> bool:
        return path.startswith(str(self.room))

    @contextmanager
    def seconds(self, most: float) -> Iterator[None]:
        """Limit the time of what is inside."""

        def over(number: int, frame: FrameType | None) -> None:
            raise TookTooLongError(f"over {most} s")

        before = signal.signal(signal.SIGALRM, over)
        signal.setitimer(signal.ITIMER_REAL, most)
        self.active = True
        try:
            yield
        finally:
            self.active = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def outcome(self, target: Target, chance: Random) -> str:
        """ "read" or "refused".

        Raises:
            AssertionError: it was none of both, or something happened beside it.
        """
        target.file.write_bytes(target.made(chance))
        self.faults.clear()
        try:
            with self.seconds(SECONDS):
                target.read()
            found = "read"
        except InputError as error:
            found, said = "refused", str(error)
            assert said, "refused without a word"
            assert len(said) < MESSAGE, f"a message of {len(said)} characters: {said[:300]}"
        assert not self.faults, self.faults
        return found


def _writes(arguments: tuple[Any, ...]) -> bool:
    mode, flags = arguments[1], arguments[2]
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return isinstance(flags, int) and bool(flags & 0x3)


def _within_import() -> bool:
    """Whether Python is reading one of its own modules, which are marshalled code."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def limit_memory(more: int = MEMORY) -> None:
    """Let this process grow by so much and no more (Linux)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return
    gc.collect()
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    now = 1024 * int(lines["VmData"].split()[0])
    resource.setrlimit(resource.RLIMIT_DATA, (now + more, resource.RLIM_INFINITY))


def counted(outcomes: Counter[tuple[str, str]]) -> list[str]:
    """A table in Markdown."""
    ends = ("read", "refused", "failed")
    rows = ["| file | cases | read | refused | failed |", "|---|---|---|---|---|"]
    for kind in dict.fromkeys(kind for kind, _ in outcomes):
        own = [outcomes[kind, end] for end in ends]
        rows.append(f"| {kind} | {sum(own)} | {' | '.join(map(str, own))} |")
    every = [sum(n for (_, found), n in outcomes.items() if found == end) for end in ends]
    return [*rows, f"| all | {sum(every)} | {' | '.join(map(str, every))} |"]
