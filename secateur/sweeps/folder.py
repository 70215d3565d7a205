"""The folder of a sweep: one folder per run, and a hidden one for what they share."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

from secateur.io.atomic import remove_partials
from secateur.io.run_directory import MAX_BYTES, difference, taken, write_whole
from secateur.io.safe_parse import refuse_links
from secateur.io.schema import read_object
from secateur.report.run_records import read_run
from secateur.utils.errors import InputError, shown, words

SHARED = ".shared"


class Folder:
    """The folder of one sweep.

    Attributes:
        out: the folder, in which every finished run has one of its own.
        shared: what they share: the dense model's figures, and statistics until all are done.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.shared = out / SHARED
        self._asked = self.shared / "asked.json"

    def check(self, asked: dict[str, Any]) -> None:
        """Refuse a folder that holds something else, or runs with other common options than
        ``asked``.

        Nothing is written through symbolic links in it, now or later.

        Raises:
            InputError: it does.
        """
        out = self.out
        if out.exists() and not out.is_dir():
            raise InputError(f"output {str(out)!r} is a file; a sweep writes a folder.")
        if out.is_dir() and any(out.iterdir()) and not self.shared.is_dir():
            raise InputError(
                f"output {str(out)!r} exists and is no sweep's; choose another folder, or an empty "
                f"one."
            )
        refuse_links(self.shared)
        now = json.loads(json.dumps(asked))
        before = now
        if self._asked.exists():
            before = read_object(self._asked, "sweep", MAX_BYTES)
        for name in sorted(k for k in {*now, *before} if now.get(k) != before.get(k)):
            where, was, new = difference(name, before, now)
            raise InputError(
                f"the runs in {str(out)!r} had another {words(where)} ({shown(was)}, now "
                f"{shown(new)}), and would not be comparable. Choose another folder, or remove "
                f"this one."
            )

    @contextmanager
    def opened(self, asked: dict[str, Any]) -> Iterator[None]:
        """Open the folder for a sweep whose runs have the common options ``asked``.

        Finished runs stay, however the sweep ends.

        Raises:
            InputError: another sweep is at work there, or its runs had something else in common.
        """
        self.check(asked)
        lock = taken(self.shared, self.out, "sweep")
        try:
            remove_partials(self.shared, "dense-*", host=False)  # of a sweep that was killed
            write_whole(self._asked, json.dumps(asked, indent=1))
            yield
        finally:
            own = {path.name for path in self.out.iterdir()}
            if own == {SHARED} and not any(self.shared.glob("dense-*.json")):  # nothing was done
                shutil.rmtree(self.shared, ignore_errors=True)
            lock.release()
            if not self.shared.exists():
                with suppress(OSError):
                    self.out.rmdir()

    def finished(self, name: str, asked: str) -> bool:
        """Whether a run with the options ``asked`` is finished.

        Raises:
            InputError: something else lies there.
        """
        folder = self.out / name
        if not folder.exists():
            return False
        lines = zip_longest(
            read_run(folder).recipe.splitlines(), asked.splitlines(), fillvalue="nothing"
        )
        was, new = next((pair for pair in lines if pair[0] != pair[1]), (None, None))
        if was is None or new is None:
            return True
        raise InputError(
            f"run {name!r} in {str(self.out)!r} was made otherwise: {shown(was.strip())}, "
            f"now {shown(new.strip())}. Remove that folder, rename the run, or choose another OUT."
        )

    def clear(self) -> None:
        """Remove what only unfinished runs need."""
        for name in ("statistics", "logs"):
            shutil.rmtree(self.shared / name, ignore_errors=True)
