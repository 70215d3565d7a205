"""What a sweep asks for, how its runs are called and ordered, and how they are started."""

import os
import subprocess
import sys
import threading
from multiprocessing import get_context
from types import SimpleNamespace

import pytest

from secateur.io.run_directory import UnfinishedRunError
from secateur.pipeline.config import RunConfig
from secateur.sweeps import local
from secateur.sweeps.folder import Folder
from secateur.sweeps.grid import SweepRecord, read_sweep
from secateur.sweeps.local import scheduled
from secateur.sweeps.order import placed
from secateur.utils.errors import InputError
from secateur.utils.progress import Progress
from tests.support.made_runs import made_run


def asked(*runs, **rest):
    return SweepRecord.model_validate({"runs": list(runs), **rest}).asked()


def places(runs, select="none"):
    return {place.name: place for place in placed(runs, select)}


def test_every_list_makes_a_run_of_each_of_its_values():
    runs = asked(
        {"method": ["auto", "flap"], "allocator": ["uniform", "knapsack"]}, keep=[0.9, 0.8]
    )
    assert [*runs] == [
        *("auto-0.9-uniform", "auto-0.8-uniform", "auto-0.9-knapsack", "auto-0.8-knapsack"),
        *("flap-0.9-uniform", "flap-0.8-uniform", "flap-0.9-knapsack", "flap-0.8-knapsack"),
    ]
    (step,) = runs["flap-0.8-knapsack"].steps
    assert (step.method.name, step.budget.keep, step.allocator.name) == ("flap", 0.8, "knapsack")


def test_names_have_what_varies_and_no_more():
    options = {"method": "auto", "options": {"iterations": [2, 3], "ridge": 0.01}}
    assert [*asked(options, {"method": "flap", "multiple_of": 4}, keep=0.5)] == [
        *("auto-0.5-iterations-2", "auto-0.5-iterations-3", "flap-0.5")
    ]
    assert [*asked({"method": "svd", "keep": [0.5, 0.25], "name": "low_rank"})] == [
        *("low-rank-0.5", "low-rank-0.25")
    ]
    cells = {"method": "auto", "allocator": ["knapsack", "uniform"]}
    one = {"method": "auto", "allocator": "knapsack", "allocator_options": {"cells": [500, 600]}}
    assert [*asked(cells, one, keep=0.5)] == [
        *("auto-0.5-knapsack-cells-20000", "auto-0.5-uniform"),
        *("auto-0.5-knapsack-cells-500", "auto-0.5-knapsack-cells-600"),
    ]


def test_a_name_is_safe_for_a_folder(tmp_path):
    text = {"method": "forms", "keep": 0.5, "options": {"of": ["svd,rtn", "rtn"]}}
    assert [*asked(text)] == ["forms-0.5-of-svd-rtn", "forms-0.5-of-rtn"]
    file = tmp_path / "..hidden; rm -r $HOME.yaml"
    file.write_text("keep: 0.5\nsteps: [{method: auto}]")
    assert [*asked({"recipe": str(file)})] == ["hidden-rm-r-HOME-0.5"]


def test_a_keep_of_its_own_counts_and_none_is_as_the_method_has_it():
    runs = asked(
        {"method": "rtn", "keep": None},
        {"method": "flap", "keep": 0.7},
        {"method": "auto"},
        keep=0.9,
    )
    assert [*runs] == ["rtn", "flap-0.7", "auto-0.9"]
    assert runs["rtn"].steps[0].budget.keep == "least"


def test_what_is_asked_for_twice_is_there_once():
    assert [
        *asked(
            {"method": ["flap", "flap"]}, {"method": "flap", "tier": "per-layer"}, keep=[0.9, 0.9]
        )
    ] == ["flap-0.9"]


def test_the_target_is_the_methods_own_as_for_compress():
    runs = asked({"method": ["flap", "svd"]}, {"method": "auto", "target": "cache"}, keep=0.5)
    assert [r.steps[0].budget.target for r in runs.values()] == ["parameters", "bytes", "cache"]


def test_recipes_are_followed_at_every_keep(tmp_path):
    file = tmp_path / "two steps.yaml"
    file.write_text("keep: 0.5\nsteps: [{method: auto}, {method: gptq}]")
    runs = asked({"recipe": str(file)}, keep=[0.3, 0.2])
    assert [*runs] == ["two-steps-0.3", "two-steps-0.2"]
    assert runs["two-steps-0.2"].keep == 0.2
    assert [*asked({"recipe": str(file)})] == ["two-steps-0.5"]
    steps = [{"method": "auto", "keep": 0.9}, {"method": "rtn"}]
    assert [*asked({"steps": steps, "keep": None}, keep=0.3)] == ["auto+rtn"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"runs": []}, ["runs"]),
        ({"steps": [{"method": "auto"}]}, ["a recipe", "--recipe"]),
        ({"runs": [{}]}, ["none of them"]),
        ({"runs": [{"method": "auto", "recipe": "r.yaml"}]}, ["method and recipe"]),
        ({"runs": [{"recipe": "r.yaml", "allocator": "uniform"}]}, ["allocator stands beside"]),
        ({"runs": [{"recipe": "missing.yaml"}]}, ["missing.yaml"]),
        ({"runs": [{"method": "atuo"}]}, ["did you mean 'auto'"]),
        ({"runs": [{"method": "auto", "options": {"iteratons": 1}}]}, ["iterations"]),
        ({"runs": [{"method": "auto", "keep": 0}]}, ["above 0"]),
        ({"runs": [{"method": "auto", "keep": 1.5}]}, ["keep"]),
        ({"runs": [{"method": "auto", "keep": []}]}, ["keep"]),
        ({"runs": [{"method": "auto", "allocator": "knapsak"}]}, ["knapsack"]),
        ({"runs": [{"method": "auto", "name": "../up"}]}, ["name"]),
        ({"runs": [{"method": "auto", "multiple_of": 0}]}, ["multiple_of"]),
        ({"runs": [{"method": "auto", "tier": "plan"}]}, ["plain"]),
        ({"runs": [{"method": "auto", "alocator": "uniform"}]}, ["alocator"]),
        ({"runs": [{"method": "auto"}], "settings": {"trust_remote_code": True}}, ["trust_remote"]),
        ({"runs": [{"method": "auto"}], "version": 2}, ["version"]),
        ({"runs": [{"method": "auto", "name": "x"}, {"method": "flap", "name": "x"}]}, None),
        (
            {"runs": [{"method": "auto", "multiple_of": [*range(1, 40)]}], "keep": [0.5] * 40},
            ["1000 runs"],
        ),
        ({"runs": [{"method": "rtn", "name": "frontier.svg", "keep": None}]}, ["frontier.svg"]),
    ],
)
def test_what_is_no_sweep_is_refused(content, words, tmp_path):
    import yaml

    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(content))
    if words is None:  # two methods of one name: told apart by the method
        assert [*read_sweep(file).asked()] == ["x-0.8-auto", "x-0.8-flap"]
        return
    with pytest.raises(InputError) as error:
        read_sweep(file).asked()
    for word in words:
        assert word.lower() in str(error.value).lower()


@pytest.mark.parametrize("text", ["runs: {", "- 1", "[" * 1500, "\x00", "a: &a [*a]"])
def test_a_file_that_is_no_yaml_is_refused(text, tmp_path):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(InputError, match=r"s\.yaml"):
        read_sweep(tmp_path / "s.yaml")


def test_runs_stand_behind_those_whose_work_they_use():
    runs = asked(
        {"method": "auto", "allocator": ["influence", "knapsack"]},
        {"method": "flap"},
        keep=[0.9, 0.8],
    )
    found = places(runs)
    assert [*found] == [
        *("auto-0.9-knapsack", "auto-0.8-knapsack"),  # losses are measured first
        *("auto-0.9-influence", "auto-0.8-influence"),
        *("flap-0.9", "flap-0.8"),
    ]
    first = found["auto-0.9-knapsack"]
    assert (first.reads, first.scores, first.after) == (None, None, frozenset())
    for name in [*found][1:4]:
        assert (found[name].reads, found[name].scores) == ("auto-0.9-knapsack",) * 2
        assert found[name].statistics == first.statistics
    assert found["flap-0.9"].after == frozenset()
    assert found["flap-0.8"].after == {"flap-0.9"}
    assert found["flap-0.9"].statistics != first.statistics


def test_scores_of_other_options_or_readings_are_not_shared():
    found = places(asked({"method": "auto", "options": {"ridge": [0.1, 0.2]}}, keep=0.9))
    one, other = found.values()
    assert other.scores is None
    assert other.reads == one.name  # the statistics are the same
    found = places(asked({"method": "flap", "allocator": ["uniform", "fluctuation"]}, keep=0.9))
    assert [place.scores for place in found.values()] == [None, None]


def test_text_chosen_for_one_run_serves_no_other():
    """The mistake: a folder of statistics that the second run refuses, as its tokens differ."""
    found = places(asked({"method": "auto"}, keep=[0.9, 0.8]), select="kl")
    assert all((p.statistics, p.reads, p.scores) == (None,) * 3 for p in found.values())


def test_a_step_of_a_recipe_uses_scores_and_has_its_own_statistics():
    steps = [{"method": "auto"}, {"method": "gptq"}]
    found = places(asked({"method": "auto"}, {"steps": steps}, keep=0.9))
    assert found["auto+gptq-0.9"].statistics is None
    assert found["auto+gptq-0.9"].scores == "auto-0.9"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "not enough memory"),
        (OSError(28, "No space left on device"), "No space left on device. What it had finished"),
        (UnfinishedRunError("an unfinished run had another seed. Repeat."), ".a.partial' to start"),
        (ZeroDivisionError("mistake"), None),
    ],
)
def test_what_ends_one_run_is_said_and_mistakes_are_not_hidden(monkeypatch, error, words, tmp_path):
    from secateur.sweeps import job

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(job, "run", fails)
    (recipe,) = asked({"method": "flap"}, keep=0.9).values()
    own = job.Job("a", RunConfig("m", tmp_path / "a", recipe), tmp_path)
    if words is None:
        with pytest.raises(ZeroDivisionError):
            job.perform(own, Progress())
    else:
        assert words in job.perform(own, Progress())


class Fake:
    """A job, and what was started while what was running."""

    def __init__(self, name, after=()):
        self.name, self.after = name, frozenset(after)


def test_a_run_waits_for_those_before_it_and_for_room():
    jobs = [Fake("a"), Fake("b", ["a"]), Fake("c", ["a"]), Fake("d"), Fake("e", ["b", "gone"])]
    log, most = [], []

    def first_done(running):
        most.append(len(running))
        return running[0], "bad" if running[0] == "a" else None  # a failure holds nobody up

    def start(job):
        log.append(job.name)
        return job.name

    found = [(job.name, why) for job, why in scheduled(jobs, start, first_done, 2)]
    assert log == ["a", "d", "b", "c", "e"]
    assert max(most) == 2
    assert found == [("a", "bad"), ("d", None), ("b", None), ("c", None), ("e", None)]


def test_a_recipe_with_other_ends_of_lines_is_the_same(tmp_path):
    """As an editor leaves it. The mistake: it differs, and in no line."""
    folder, asked = Folder(tmp_path), "keep: 0.9\nsteps:\n- auto\n"
    record = made_run(tmp_path / "run") / "secateur" / "recipe.yaml"
    for text in (asked, asked.rstrip(), asked.replace("\n", "\r\n")):
        record.write_bytes(text.encode())
        assert folder.finished("run", asked)
    for text in (asked + "more", "keep: 0.9", ""):
        record.write_text(text)
        with pytest.raises(InputError, match="was made otherwise"):
            folder.finished("run", asked)


def test_what_a_killed_sweep_was_measuring_goes(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    folder = Folder(tmp_path / "out")
    with folder.opened({}):
        rests = [folder.shared / f"dense-a.{n}.partial" for n in (gone.pid, os.getpid())]
        for rest in (*rests, folder.shared / "dense-a.json"):
            rest.touch()
    with folder.opened({}):
        assert [rest.exists() for rest in rests] == [False, True]


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
@pytest.mark.parametrize("answer", ["x" * 200_000, None])
def test_an_answer_may_be_larger_than_a_pipe(monkeypatch, tmp_path, answer):
    """The mistake: to wait for the end of a process that waits for its answer to be read."""
    monkeypatch.setattr(local, "get_context", lambda _: get_context("fork"))
    monkeypatch.setattr(local, "perform", lambda job, progress: answer)
    jobs = [SimpleNamespace(name=name, after=frozenset()) for name in ("a", "b")]
    found = []
    given = (jobs, Progress(), 2, tmp_path / "logs")
    thread = threading.Thread(target=lambda: found.extend(local.side_by_side(*given)), daemon=True)
    thread.start()
    thread.join(60)
    assert [told for _, told in found] == [answer, answer]


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_a_process_that_ends_without_an_answer_is_said_so(monkeypatch, tmp_path):
    monkeypatch.setattr(local, "get_context", lambda _: get_context("fork"))
    monkeypatch.setattr(local, "perform", lambda job, progress: os._exit(3))
    jobs = [SimpleNamespace(name="a", after=frozenset())]
    ((_, told),) = local.side_by_side(jobs, Progress(), 2, tmp_path / "logs")
    assert "without an answer (3)" in told
