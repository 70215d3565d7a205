"""Classes by name: the project's own, and those that installed packages declare."""

import sys

import pytest

from secateur.allocate import REGISTRY as ALLOCATING
from secateur.allocate.base import Allocator
from secateur.allocate.uniform import Uniform
from secateur.cli.main import cli
from secateur.methods import METHODS, REGISTRY, method_class, method_classes
from secateur.planning.plan import Choice
from secateur.utils.errors import InputError

ALLOCATOR = """
from dataclasses import dataclass
from typing import ClassVar
from secateur.extend import Uniform, option

@dataclass(frozen=True)
class Same(Uniform):
    {field}
    name: ClassVar[str] = "same"
    summary: ClassVar[str] = "the same"
    source: ClassVar[str] = "a test"
"""
GOOD = ALLOCATOR.format(field='much: float = option(0.5, "of it", 0.0, 1.0)')


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a module where packages are installed, with the metadata that pip would write."""

    def made(package, code, value="Same", name="same", group="secateur.allocators"):
        module = package.replace("-", "_")
        site = tmp_path / package
        metadata = site / f"{module}-2.1.dist-info"
        metadata.mkdir(parents=True)
        (site / f"{module}.py").write_text(code)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 2.1")
        (metadata / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}:{value}\n")
        monkeypatch.syspath_prepend(site)
        monkeypatch.delitem(sys.modules, module, raising=False)
        return module

    return made


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


def test_commands_show_what_is_there_and_what_is_broken(install, capsys):
    install("more-allocators", GOOD)
    install("broken", "1 / 0", name="ratio", group="secateur.methods")
    cli(["ls"], standalone_mode=False)
    shown = " ".join(capsys.readouterr().out.split())
    assert "same the same (a test) from more-allocators 2.1 --much of it (default 0.5)" in shown
    assert "method 'ratio' of package broken 2.1 can't be loaded: ZeroDivisionError" in shown
    cli(["plan", "--allocator", "same", "--help"], standalone_mode=False)
    assert "--much FLOAT [same] of it" in " ".join(capsys.readouterr().out.split())


def test_a_field_that_is_named_as_a_commands_own_option_is_refused(install):
    install("double", ALLOCATOR.format(field='samples: int = option(3, "of them")'))
    with pytest.raises(InputError, match=r"allocator 'same'.*--samples"):
        cli(["plan", "demo", "--allocator", "same"], standalone_mode=False)
