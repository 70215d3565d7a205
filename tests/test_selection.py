"""What the fast run meets, and how it chooses among tests that differ in parameters alone."""

from typing import get_args

from secateur.cli.main import cli
from secateur.families import FAMILIES
from secateur.methods import METHODS
from secateur.structure.budget import Written
from tests.support.covering import covering
from tests.support.met import named, unmet

PRODUCT = [{"method": m, "name": n, "kind": k} for m in "abc" for n in "vwxyz" for k in "12"]


def test_every_value_is_met_by_as_few_as_there_are_values():
    chosen = [PRODUCT[index] for index in covering(PRODUCT, [0] * len(PRODUCT))]
    assert len(chosen) == 5
    for parameter, known in (("method", "abc"), ("name", "vwxyz"), ("kind", "12")):
        assert {row[parameter] for row in chosen} == set(known)


def test_cheaper_ones_come_first_and_costly_ones_only_for_what_they_lack():
    cheap = [row["name"] in "vw" for row in PRODUCT]
    chosen = [PRODUCT[index] for index in covering(PRODUCT, [not own for own in cheap])]
    assert {row["method"] for row in chosen if row["name"] in "vw"} == set("abc")
    assert sorted(row["name"] for row in chosen if row["name"] not in "vw") == list("xyz")


def test_a_list_of_cases_stays_whole():
    cases = [{"size, word": (size, word)} for size, word in ((1, "a"), (1, "b"), (2, "a"))]
    assert sorted(covering(cases, [0, 0, 0])) == [0, 1, 2]


def everything():
    """What a run that leaves nothing out has met."""
    found = {("method", name) for name in METHODS} | {("command", name) for name in cli.commands}
    found |= {("tier", name) for name in get_args(Written)}
    types = [(number, name) for number, own in enumerate(FAMILIES) for name in own.model_types]
    return found | {("family", named(number, name)) for number, name in types}


def test_what_a_run_did_not_meet_is_named():
    """``pytest_sessionfinish`` holds each whole run against this."""
    assert unmet(everything()) == []
    for lacking in (("method", "flap"), ("tier", "plain"), ("command", "push")):
        assert unmet(everything() - {lacking}) == [" ".join(lacking)]
    assert len(unmet(set())) == len(everything())
