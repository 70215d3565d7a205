"""Classes by name: the project's own, and those that installed packages declare."""

import sys

import pytest

from secateur.allocate import REGISTRY as ALLOCATING
from secateur.allocate.base import Allocator
from secateur.allocate.uniform import Uniform
from secateur.methods import METHODS, REGISTRY, method_class, method_classes
from secateur.planning.plan import Choice
from secateur.utils.errors import InputError
from tests.support.packages import ALLOCATOR, GOOD, put


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Make a package importable, and its metadata readable; the value is its module's name."""

    def installed(package, *code, **where):
        module = package.replace("-", "_")
        monkeypatch.syspath_prepend(put(tmp_path, package, *code, **where))
        monkeypatch.delitem(sys.modules, module, raising=False)
        return module

    return installed


def test_a_package_adds_a_class_that_is_imported_when_asked_for(install):
    module = install("more-allocators", GOOD)
    assert ALLOCATING.package("same") == "more-allocators 2.1"
    assert ALLOCATING.package("uniform") is None
    assert ALLOCATING.get("uniform") is Uniform
    assert module not in sys.modules
    found = ALLOCATING.get("same")
    assert issubclass(found, Allocator)
    assert module in sys.modules
    usable, problems = ALLOCATING.survey()
    assert list(usable) == [*ALLOCATING.own, "same"]
    assert problems == []
    chosen = Choice.of(found(much=0.25), ALLOCATING)
    assert chosen.model_dump() == {
        "name": "same",
        "options": {"much": 0.25},
        "package": "more-allocators 2.1",
    }


def test_of_the_projects_own_a_plan_names_no_package():
    assert Choice.of(Uniform(), ALLOCATING).model_dump() == {"name": "uniform", "options": {}}


def test_a_name_of_two_packages_is_neithers(install):
    install("one", GOOD)
    install("two", GOOD)
    with pytest.raises(InputError, match=r"'same'.*(one 2.1, two 2.1|two 2.1, one 2.1)"):
        ALLOCATING.get("same")
    usable, problems = ALLOCATING.survey()
    assert list(usable) == list(ALLOCATING.own)
    assert len(problems) == 1


def test_a_name_of_the_projects_own_is_not_replaced_in_silence(install):
    install("taker", GOOD, name="uniform")
    with pytest.raises(InputError, match=r"'uniform'.*secateur, taker 2.1"):
        ALLOCATING.get("uniform")
    assert "uniform" not in ALLOCATING.survey()[0]


@pytest.mark.parametrize(
    ("code", "value", "said"),
    [
        ("import no_such_module", "Same", "ModuleNotFoundError"),
        ("raise RuntimeError('old\\nCUDA')", "Same", "RuntimeError: old"),
        ("def :", "Same", "SyntaxError"),
        (GOOD, "Other", "AttributeError"),
        ("Same = 3", "Same", "no class that extends secateur.extend.Allocator"),
        ("class Same: name = 'same'", "Same", "no class that extends"),
        ("from secateur.extend import Allocator as Same", "Same", "lacks allocate"),
        (GOOD.replace('= "same"', '= "other"'), "Same", "name is 'other'"),
        (ALLOCATOR.format(field="much: float = 0.5"), "Same", "field much"),
        (ALLOCATOR.format(field="much: bool = option(True, 'a')"), "Same", "field much"),
        (GOOD.replace("@dataclass(frozen=True)\n", ""), "Same", "no frozen dataclass"),
    ],
)
def test_a_broken_package_is_named_and_breaks_nothing_else(install, code, value, said):
    install("broken", code, value)
    usable, (problem,) = ALLOCATING.survey()
    assert list(usable) == list(ALLOCATING.own)
    assert "'same' of package broken 2.1" in problem
    assert said in problem
    assert "\n" not in problem
    with pytest.raises(InputError, match="broken"):
        ALLOCATING.get("same")


def test_an_unknown_name_says_what_to_install():
    with pytest.raises(InputError, match=r"Did you mean 'auto'.*extension.*secateur ls"):
        REGISTRY.get("autoo")
    with pytest.raises(InputError, match=r"'gone'.*Package 'their-methods 1.0'.*not.*installed"):
        method_class("gone", "their-methods 1.0")


def test_without_any_metadata_the_projects_own_are_there(monkeypatch):
    """As in a source checkout, whose metadata is of its last installation."""
    monkeypatch.setattr("secateur.utils.registry.entry_points", lambda group: ())
    monkeypatch.setattr("sys.path", [*sys.path, "elsewhere"])
    assert list(method_classes()) == list(METHODS)
