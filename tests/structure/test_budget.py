"""A budget's fields are where the command line, recipes, sweeps and plans get theirs from."""

import subprocess
import sys
from dataclasses import fields

import click
import pytest

from secateur import Auto, Budget, InputError, Step
from secateur.cli import parse
from secateur.cli.main import cli
from secateur.planning.recipe import Recipe, StepRecord
from secateur.structure.budget import flag_of, key_of
from secateur.sweeps.grid import SweepRecord

#: of every field a value that is not its default
OTHER = {
    "keep": 0.6,
    "target": "bytes",
    "tier": "plain",
    "multiple_of": 16,
    "batch": 2,
    "length": 32,
    "runtime": "gguf",
}


def test_every_field_has_another_value_here():
    assert {f.name for f in fields(Budget)} == set(OTHER)
    assert all(getattr(Budget(), name) != value for name, value in OTHER.items())


@pytest.mark.parametrize("command", ["compress", "plan", "sweep"])
def test_every_field_is_an_option(command):
    options = {option for p in cli.commands[command].params for option in p.opts}
    assert {f"--{flag_of(f)}" for f in fields(Budget)} <= options


def test_what_is_typed_is_the_budget():
    given = {key_of(f): OTHER[f.name] for f in fields(Budget)}
    with click.Context(cli.commands["compress"]) as ctx:
        assert parse.budget(ctx, given) == Budget(**OTHER)


def test_files_have_every_field():
    """The mistake: a field that is written and not read."""
    step = Step.of(Auto(), Budget(**OTHER))
    assert StepRecord.model_validate(step.as_dict()).step() == step
    own = {key_of(f): OTHER[f.name] for f in fields(Budget)}
    runs = SweepRecord.model_validate({"runs": [{"method": "auto", **own}]}).asked()
    assert [*runs.values()] == [Recipe((step.filled,))]


def test_least_is_a_word_of_its_own():
    zero, word = ({"runs": [{"method": "rtn"}], "keep": [keep]} for keep in (0, "least"))
    found = [SweepRecord.model_validate(content).asked() for content in (zero, word)]
    assert found[0] == found[1]
    assert found[0]["rtn"].steps[0].budget.keep == "least"
    with pytest.raises(InputError, match=r"keep 0 should be above 0.*'least'"):
        Budget(keep=0)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"keep": "some"}, "'some'"),
        ({"target": "byte"}, "Did you mean 'bytes'"),
        ({"tier": "plan"}, "Did you mean 'plain'"),
        ({"multiple_of": 0}, "at least 1"),
        ({"multiple_of": 2.5}, "whole number"),
        ({"batch": 2**12, "length": 2**13}, "latency"),
    ],
)
def test_what_no_budget_can_be_is_refused(given, words):
    with pytest.raises(InputError, match=words):
        Budget(**given)


def test_it_costs_no_import_of_torch():
    """The command line takes its options from it, and help must be quick."""
    code = "import sys, secateur.structure.budget; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
