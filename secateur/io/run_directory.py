"""The hidden folder beside the output in which a run works until its result is complete."""

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
    """A named stage of a run whose result is stored as plain data; ``made`` creates its value.

    It is computed again if ``made`` raises ``InputError`` for the stored data.
    """

    def __call__(
        self, name: str, compute: Callable[[], Content], made: Callable[[Content], T]
    ) -> T: ...


def at_once(name: str, compute: Callable[[], Content], made: Callable[[Content], T]) -> T:
    """A stage whose result is not stored."""
    return made(compute())


class Workspace:
    """The finished stages of one run, so that repeating the command resumes it.

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
        """Open the folder for a run described by ``fingerprint``.

        A killed run is resumed if the fingerprint is the same. A run that is stopped, for example
        by a full disk, leaves what it has finished. A run with invalid input leaves nothing, unless
        it has finished something that can be used (see :func:`for_good`).

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
        """Whether a stage is finished; a result alone can't be resumed."""
        rest = {"lock", FINGERPRINT, self.result.name}
        return any(entry.name not in rest for entry in self.folder.iterdir())

    def _forget(self) -> None:
        """Remove all files except the lock, the fingerprint first, so that no rest is taken for
        a run.
        """
        (self.folder / FINGERPRINT).unlink(missing_ok=True)
        for entry in self.folder.iterdir():
            if entry.name != "lock":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def _tidy(self) -> None:
        """Remove what a run left that was killed after its result had its final name."""
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
        """Whether there is something to resume."""
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
        """The fingerprint of the unfinished run; empty if it is damaged."""
        try:
            return read_object(path, "unfinished run", MAX_BYTES)
        except InputError as error:
            if self.overwrite:
                return {}
            raise UnfinishedRunError(f"{error} Remove its folder, or add --overwrite.") from error

    def stage(self, name: str, compute: Callable[[], Content], made: Callable[[Content], T]) -> T:
        """The result of a stage: stored by an earlier run of the same command, or computed now."""
        return once(self.folder / f"{name}.json", compute, made)

    def publish(self) -> None:
        """Move the result to its final name; an old result is removed only afterwards."""
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
    """Wait until a folder and all files in it are on the disk and survive a power failure.

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
    """Lock the folder in which one process at a time makes ``out``; create it if necessary.

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
    """Whether a folder looks like a model, so that it is not replaced by mistake."""
    return folder.is_dir() and ((folder / "config.json").exists() or not any(folder.iterdir()))


def once(path: Path, compute: Callable[[], Content], made: Callable[[Content], T]) -> T:
    """The value that ``made`` creates from the data in a file; computes and writes them first if
    missing.
    """
    if path.exists():
        with suppress(InputError):  # damaged: it is computed again
            return made(read_object(path, "stage of a run", MAX_BYTES))
    write_whole(path, json.dumps(compute()))
    return made(read_object(path, "stage of a run", MAX_BYTES))


def digest(path: Path) -> str:
    """SHA-256 of a file; None if it can't be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def difference(name: str, before: Any, now: Any) -> tuple[str, Any, Any]:
    """The dotted name of the innermost entry that differs."""
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
    """An unfinished run must not be removed, because its own command can still resume it."""


class FutileError(InputError):
    """The command can never succeed, so what its run left behind is of no use."""


@contextmanager
def for_good() -> Iterator[None]:
    """Mark input errors raised in this context as permanent.

    Raises:
        FutileError: in place of an ``InputError``.
    """
    try:
        yield
    except InputError as error:
        raise FutileError(str(error)) from error


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary name for a file, which gets its final name when it is complete.

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
    """Write a text file so that it appears complete or not at all."""
    with whole(path) as partial, partial.open("x") as file:
        file.write(text)
