"""A quick selection of mutated files; `python -m tests.fuzz` tries as many as one likes."""

import os
import pickle
import tempfile
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import watch
from tests.fuzz.__main__ import SHARES
from tests.fuzz.mutations import PIECES, RAW, as_json, as_yaml
from tests.fuzz.targets import Target, Targets

#: examples of a kind; those that build or draw something for every case take longer
COUNTS = {
    **{"plan": 300, "recipe": 120, "config": 120, "checkpoint config": 100, "weight header": 300},
    **{"weights": 50, "index": 120, "report": 80, "run's plan": 50, "scores": 50},
    **{"statistics": 200, "journal": 60, "task file": 120, "text lines": 120},
    **{"block's statistics": 80, "sweep": 120, "unfinished run": 100, "shared by runs": 100},
}


@pytest.fixture(scope="session")
def room():
    with tempfile.TemporaryDirectory() as folder:
        inside = Path(folder).resolve() / "room"
        inside.mkdir()
        yield inside


@pytest.fixture(scope="session")
def targets(room):
    return Targets(room)


@pytest.fixture(scope="session")
def watching(room):
    return watch.Watch(room)


@pytest.mark.parametrize("kind", SHARES)
def test_a_mutated_file_is_read_or_refused(targets, watching, kind):
    target, seen = targets.all[kind](), set()

    @settings(
        max_examples=COUNTS[kind],
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[*HealthCheck],
    )
    @given(st.integers(0, 2**32 - 1))
    def case(number):
        seen.add(watching.outcome(target, Random(number)))

    case()
    assert seen == {"read", "refused"}  # or nothing was looked at


def by(target_file, read):
    """A target of which every case is the same."""
    return Target(target_file, lambda _: b"{}", read)


def test_the_watch_sees_what_must_not_happen(room, watching, tmp_path):
    def outcome(read):
        return watching.outcome(by(room / "file", read), Random(0))

    def endless():
        while True:
            pass

    outside = tmp_path / "outside"
    assert outcome(lambda: (room / "other").write_text("a")) == "read"
    with pytest.raises(AssertionError, match="outside"):
        outcome(lambda: outside.write_text("a"))
    with pytest.raises(AssertionError, match=r"os\.rename"):
        outcome(lambda: outside.rename(tmp_path / "there"))
    with pytest.raises(AssertionError, match="find_class"):
        outcome(lambda: pickle.loads(pickle.dumps(Path("a"))))
    with pytest.raises(AssertionError, match="ran"):
        outcome(lambda: exec(compile("1", str(room / "code.py"), "exec")))
    with pytest.raises(AssertionError, match="Popen"):
        outcome(lambda: os.popen("true").close())
    with pytest.raises(ZeroDivisionError):
        outcome(lambda: 1 / 0)
    with pytest.raises(watch.TookTooLongError), watching.seconds(0.05):
        endless()


def test_raw_pieces_are_written_as_they_are():
    for piece in PIECES:
        assert piece.encode() in as_json({"a": f"{RAW}{piece}{RAW}"}, Random(0))
    assert b"a: 1e999" in as_yaml({"a": f"{RAW}1e999{RAW}"}, Random(0))
