"""The folder a run works in: hidden beside its output until everything in it is whole."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import filelock
from safetensors import SafetensorError

from secateur.io.safe_parse import refuse_links
from secateur.io.schema import read_object
from secateur.utils.errors import HaltedError, InputError, RunError, shown, words

MAX_BYTES = 2**28
AGAIN = " Repeat the command, which then starts afresh."
#: what is in the folder of a run that goes on with its result: blocks that are narrowed, or all
NARROWING, WRITTEN = "narrowing", "written.json"
FINGERPRINT = "fingerprint.json"
Content = dict[str, Any]
T = TypeVar("T")


class Memo(Protocol):
    """A named part of a run: what ``made`` makes of plain data, from before or computed now.

    It is computed again where ``made`` raises ``InputError`` for what was kept.
    """

    def __call__(
        self, name: str, compute: Callable[[], Content], made: Callable[[Content], T]
    ) -> T: ...


def at_once(name: str, compute: Callable[[], Content], made: Callable[[Content], T]) -> T:
    """A stage of which nothing is kept."""
    return made(compute())


class Workspace:
    """Finished stages of one run, so that the same command typed again goes on from them.

    Attributes:
        out: where the result will appear.
        folder: where the run works, ``.NAME.partial`` beside ``out``.
        result: the folder inside it that becomes ``out``.
    """

    def __init__(self, out: Path, overwrite: bool) -> None:
        self.out = out
        self.overwrite = overwrite
        self.folder = out.parent / f".{out.name}.partial"
        self.result = self.folder / "result"
        self._old = self.folder / "replaced"
        self._ready = self.folder / "ready"  # the result is whole, and next gets its final name

    @contextmanager
    def opened(self, fingerprint: dict[str, Any]) -> Iterator[None]:
        """Take the folder for a run described by ``fingerprint``.

        A run that was killed is taken up again if the fingerprint is the same. A run that is
        stopped, by a full disk for one, leaves what it finished; one whose input is wrong leaves
        nothing if it has finished nothing, or if that can be of no use (:func:`for_good`).

        Raises:
            InputError: ``out`` exists, another run is working there, or an unfinished one was
                started with other inputs.
        """
        if self.out.exists() and not self.overwrite:
            self._tidy()
            raise InputError(
                f"output {str(self.out)!r} exists; choose another folder or add --overwrite."
            )
        if self.out.exists() and not is_checkpoint(self.out):
            raise InputError(
                f"output {str(self.out)!r} exists and is no checkpoint; --overwrite replaces "
                f"checkpoints only. Choose another folder."
            )
        refuse_links(self.folder)
        missing = [parent for parent in self.folder.parents if not parent.exists()]
        lock = taken(self.folder, self.out, "run")
        keep = True
        try:
            taken_up = self._take_up(fingerprint)
            try:
                yield
                keep = False
            except (UnfinishedRunError, HaltedError):
                raise
            except FutileError:
                keep = False
                raise
            except InputError:  # a device, a file or a folder may be away for now only
                keep = taken_up or self._begun()
                raise
            except RunError:
                keep = False
                raise
        finally:
            if not keep:
                self._forget()
                shutil.rmtree(self.folder, ignore_errors=True)
            lock.release()
            for parent in missing:  # nearest first; only those that this run made and left empty
                with suppress(OSError):
                    parent.rmdir()

    def _begun(self) -> bool:
        """Whether something is finished; of the result, nothing is of use by itself."""
        rest = {"lock", FINGERPRINT, self.result.name}
        return any(entry.name not in rest for entry in self.folder.iterdir())

    def _forget(self) -> None:
        """Remove all but the lock; first of all what it is about, so that no rest passes for it."""
        (self.folder / FINGERPRINT).unlink(missing_ok=True)
        for entry in self.folder.iterdir():
            if entry.name != "lock":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def _tidy(self) -> None:
        """Remove what is left of a run that was killed when its result had its final name."""
        if self.folder.is_symlink() or not self.folder.is_dir():
            return
        published = self._ready.exists() and not self.result.exists()
        if (self.folder / FINGERPRINT).exists() and not published:
            return
        lock = filelock.FileLock(self.folder / "lock")
        with suppress(filelock.Timeout, OSError), lock.acquire(timeout=0):
            self._forget()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _take_up(self, fingerprint: dict[str, Any]) -> bool:
        """Whether something was there to go on with."""
        if self._old.exists() and not self.out.exists():  # killed between the renames of publish
            self._old.rename(self.out)
        if self._old.exists():  # killed behind them
            shutil.rmtree(self._old)
        self._ready.unlink(missing_ok=True)
        path = self.folder / FINGERPRINT
        now = json.loads(json.dumps(fingerprint))
        there = path.exists()
        if not there:  # a rest that nothing speaks for
            self._forget()
        before = self._before(path) if there else now
        differing = sorted(k for k in {*now, *before} if now.get(k) != before.get(k))
        if differing and not self.overwrite:
            name, was, new = difference(differing[0], before, now)
            raise UnfinishedRunError(
                f"an unfinished run for {str(self.out)!r} had another {words(name)} "
                f"({shown(was)}, now {shown(new)}). Repeat its command to finish it, or add "
                f"--overwrite to start afresh."
            )
        if differing:
            self._forget()
        if (self.folder / WRITTEN).exists() and not (self.result / "config.json").exists():
            (self.folder / WRITTEN).unlink()  # its result went to its final name, or is not whole
        if not any((self.folder / name).exists() for name in (NARROWING, WRITTEN)):
            shutil.rmtree(self.result, ignore_errors=True)
        self.result.mkdir(exist_ok=True)
        write_whole(path, json.dumps(now, indent=1))
        return there and not differing

    def _before(self, path: Path) -> dict[str, Any]:
        """What the unfinished run was about; nothing that is known where that is damaged."""
        try:
            return read_object(path, "unfinished run", MAX_BYTES)
        except InputError as error:
            if self.overwrite:
                return {}
            raise UnfinishedRunError(f"{error} Remove its folder, or add --overwrite.") from error

    def stage(self, name: str, compute: Callable[[], Content], made: Callable[[Content], T]) -> T:
        """The result of a stage: from an earlier run of the same command, or computed now."""
        return once(self.folder / f"{name}.json", compute, made)

    def publish(self) -> None:
        """Let the result appear under its final name; an old one is gone only afterwards."""
        if self.out.exists() and not self.overwrite:
            raise UnfinishedRunError(
                f"output {str(self.out)!r} appeared while the run was working. Move it away and "
                f"repeat the command, which then goes on."
            )
        on_disk(self.result)
        self._ready.touch()
        if self.out.exists():
            self.out.rename(self._old)
        try:
            self.result.rename(self.out)
        except OSError:
            if self._old.exists():
                self._old.rename(self.out)
            raise


def on_disk(folder: Path) -> None:
    """Wait until the disk has a folder and all in it, so that nothing is empty after a power cut.

    Raises:
        OSError: it has no room for them after all.
    """
    posix = os.name == "posix"  # elsewhere a folder can't be waited for, nor a file that is read
    for path in (*sorted(folder.rglob("*")), folder):
        if posix or path.is_file():
            descriptor = os.open(path, os.O_RDONLY if posix else os.O_RDWR)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def taken(folder: Path, out: Path, what: str) -> filelock.BaseFileLock:
    """The lock of a folder in which one process at a time makes ``out``; made where it is missing.

    Raises:
        InputError: it can't be made, or another one is at work there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output {str(out)!r}: {error.strerror}.") from error
    lock = filelock.FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise InputError(f"another {what} is writing {str(out)!r}; wait for it.") from error
    return lock


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder looks like a model, so that replacing it cannot be a slip of the pen."""
    return folder.is_dir() and ((folder / "config.json").exists() or not any(folder.iterdir()))


def once(path: Path, compute: Callable[[], Content], made: Callable[[Content], T]) -> T:
    """What ``made`` makes of the plain data in a file, computed and written first without one."""
    if path.exists():
        with suppress(InputError):  # damaged: it is computed again
            return made(read_object(path, "stage of a run", MAX_BYTES))
    write_whole(path, json.dumps(compute()))
    return made(read_object(path, "stage of a run", MAX_BYTES))


def digest(path: Path) -> str:
    """SHA-256 of a file; nothing of one that can't be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def difference(name: str, before: Any, now: Any) -> tuple[str, Any, Any]:
    """The innermost entry that differs, by its dotted name."""
    was, new = before.get(name), now.get(name)
    if isinstance(was, dict) and isinstance(new, dict):
        by_name = sorted({*was, *new}, key=lambda key: (key != "name", key))  # of what it is, first
        inner = next(
            key for key in by_name if key not in was or key not in new or was[key] != new[key]
        )
        deeper, was, new = difference(inner, was, new)
        return f"{name}: {deeper}", was, new
    return name, was, new


class UnfinishedRunError(InputError):
    """What an unfinished run left must stay, as its own command can still finish it."""


class FutileError(InputError):
    """The command can't be done, however often it is typed: what its run left is of no use."""


@contextmanager
def for_good() -> Iterator[None]:
    """Say of input that is refused inside that it will always be.

    Raises:
        FutileError: in place of an ``InputError``.
    """
    try:
        yield
    except InputError as error:
        raise FutileError(str(error)) from error


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A passing name to write a file under, which gets its own when it is whole.

    Raises:
        OSError: it cannot be written; an old file of that name is as it was.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.unlink(missing_ok=True)  # a link of that name would lead elsewhere
        yield partial
        partial.replace(path)
    except SafetensorError as error:  # of a full disk, too
        raise OSError(f"cannot write {str(path)!r} ({error}); give it more space") from error
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file by :func:`whole`."""
    with whole(path) as partial, partial.open("x") as file:
        file.write(text)
