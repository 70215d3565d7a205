"""The folder a run works in: hidden beside its output until everything in it is whole."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from secateur.errors import InputError


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

    @contextmanager
    def opened(self, fingerprint: dict[str, Any]) -> Iterator[None]:
        """Take the folder for a run described by ``fingerprint``.

        A run that was killed is taken up again if the fingerprint is the same. A run that fails
        leaves nothing; one that is interrupted leaves its finished stages.

        Raises:
            InputError: ``out`` exists, another run is working there, or an unfinished one was
                started with other inputs.
        """
        if self.out.exists() and not self.overwrite:
            raise InputError(
                f"output {str(self.out)!r} exists; choose another folder or add --overwrite."
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"output {str(self.out)!r}: {error.strerror}.") from error
        lock = filelock.FileLock(self.folder / "lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise InputError(f"another run is writing {str(self.out)!r}; wait for it.") from error
        keep = False
        try:
            self._take_up(fingerprint)
            yield
        except (KeyboardInterrupt, UnfinishedRunError):
            keep = True
            raise
        finally:
            lock.release()
            if not keep:
                shutil.rmtree(self.folder, ignore_errors=True)

    def _take_up(self, fingerprint: dict[str, Any]) -> None:
        path = self.folder / "fingerprint.json"
        now = json.loads(json.dumps(fingerprint))
        before = json.loads(path.read_text()) if path.exists() else now
        differing = sorted(k for k in {*now, *before} if now.get(k) != before.get(k))
        if differing and not self.overwrite:
            name = differing[0]
            raise UnfinishedRunError(
                f"an unfinished run for {str(self.out)!r} had another {name} "
                f"({before.get(name)!r}, now {now.get(name)!r}). Repeat its command to finish it, "
                f"or add --overwrite to start afresh."
            )
        if differing:
            for entry in self.folder.iterdir():
                if entry.name != "lock":
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        shutil.rmtree(self.result, ignore_errors=True)
        self.result.mkdir()
        _write(path, json.dumps(now, indent=1))

    def stage(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of a stage: from an earlier run of the same command, or computed now."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            _write(path, json.dumps(compute()))
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def publish(self) -> None:
        """Let the result appear under its final name; an old one is gone only afterwards."""
        old = self.folder / "replaced"
        if self.out.exists():
            self.out.rename(old)
        self.result.rename(self.out)


class UnfinishedRunError(InputError):
    """What an unfinished run left must stay, as its own command can still finish it."""


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)
