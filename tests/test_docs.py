"""Links of the documentation hold, and what is generated says what the source says."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

import secateur
from scripts.docs import families, links, methods, reference
from scripts.docs.links import ROOT
from scripts.docs.markdown import docstring, section, table
from secateur.cli.main import cli
from secateur.methods import METHODS, method_class
from secateur.structure.units import MATRICES

PAGES = sorted(ROOT.glob("docs/**/*.md"))
PAGES += [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]


def wrong(text, page):
    """The links of a page that lead nowhere."""
    found = []
    for link in links.links(text):
        path, anchor = links.target(link, page)
        file = ROOT / path
        there = file.is_file() and (not anchor or anchor in links.anchors(file.read_text()))
        found += [] if there else [link]
    return found


@pytest.mark.parametrize("page", NAMES)
def test_links_lead_somewhere(page):
    assert wrong((ROOT / page).read_text(), page) == []


def test_a_wrong_link_is_found():
    text = "[a](forms.md) [b](form.md) [c](forms.md#no-such) [d](../README.md#which-models)\n"
    text += "[e](https://nowhere.example)\n```\n[f](in-code.md)\n```\n[g](#nothing)\n"
    assert wrong(text, "docs/quickstart.md") == ["form.md", "forms.md#no-such", "#nothing"]


def test_every_page_of_docs_is_in_the_index():
    index = links.links((ROOT / "docs/README.md").read_text())
    listed = {links.target(link, "docs/README.md")[0] for link in index}
    assert {n for n in NAMES if n.startswith("docs/")} - listed == {"docs/README.md"}


@pytest.mark.parametrize(
    ("heading", "anchor"),
    [
        ("Choosing: `--select-calibration`", "choosing---select-calibration"),
        ("`secateur/report.json`", "secateurreportjson"),
        ("What [it](a.md) costs, and why_not", "what-it-costs-and-why_not"),
    ],
)
def test_anchors_are_those_of_git_hosts(heading, anchor):
    assert links.anchors(f"## {heading}\n```\n# no heading\n```\n") == {anchor}


def test_headings_of_one_name_are_told_apart():
    assert links.anchors("# A\n## B\n## B\n") == {"a", "b", "b-1"}


def test_links_out_of_docs_lead_to_their_places_on_the_site():
    text = "[r](../../benchmarks/RESULTS.md#cost) [a](auto.md) [i](../../README.md) [s](#what)"
    made = "[r](../results.md#cost) [a](auto.md) [i](../project.md) [s](#what)"
    assert links.for_site(text, "docs/methods/flap.md") == made
    text = "![p](frontier.png) [d](../docs/methods/auto.md)"
    assert links.for_site(text, "benchmarks/RESULTS.md") == (
        "![p](benchmarks/frontier.png) [d](methods/auto.md)"
    )


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_on_one_page(name):
    assert methods.page_of(name).is_file()


def test_a_method_without_a_page_is_told(monkeypatch):
    monkeypatch.setitem(METHODS, "new", "secateur.methods.new:New")
    with pytest.raises(LookupError, match=r"'new'.*no page"):
        methods.page_of("new")


@pytest.mark.parametrize("name", METHODS)
def test_a_page_ends_with_what_the_source_says(name):
    page, kind = methods.page_of(name), method_class(name)
    added = methods.section(page).partition(f"\n## Reference: {name}\n")[2].partition("\n## ")[0]
    assert kind.summary in added
    assert docstring(kind) in added
    for field in fields(kind):
        assert f"| `--{field.name.replace('_', '-')}` |" in added
        assert field.metadata["help"].replace("|", "\\|") in added


RESULTS = """
## Frontier

    python a.py

### small

`held`, dense 5:

| method | keep 0.9 |
|---|---|
| flap | 1 |
| flap, knapsack | 2 |
| flapper | 3 |

Later:

| method | seconds |
|---|---|
| wanda-sp | 4 |

## Forms

    python b.py

### large

| way | share |
|---|---|
| int8, gptq | 5 |
| int4-g128, rtn | 6 |
| mix: integers | 7 |

## Cost

| method | seconds |
|---|---|
| flap | 8 |
"""


def test_figures_are_the_rows_of_the_method(tmp_path, monkeypatch):
    (tmp_path / "RESULTS.md").write_text(RESULTS)
    monkeypatch.setattr(methods, "RESULTS", tmp_path / "RESULTS.md")
    found = methods.figures("flap")
    assert "| flap | 1 |\n| flap, knapsack | 2 |\n" in found
    assert "python a.py" in found
    assert "`held`, dense 5:" in found
    for other in ("flapper", "| 8 |", "python b.py", "Later"):
        assert other not in found
    assert "| int8, gptq | 5 |" in methods.figures("gptq")
    assert "rtn" not in methods.figures("gptq").partition("python b.py")[2]
    assert "| mix: integers | 7 |" in methods.figures("forms")
    assert "no table" in methods.figures("nirvana")


@pytest.mark.parametrize("name", ["auto", "modegpt", "gptq", "forms"])
def test_both_models_are_there(name):
    found = methods.figures(name)
    assert "**stories260K**" in found
    assert "**reference-7m**" in found


def test_page_of_commands_has_every_option():
    page = reference.command_line()
    for name, command in cli.commands.items():
        own = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        assert f"secateur {name} " in own
        for option in command.params:
            assert option.param_type_name == "argument" or option.opts[0] in own


def test_page_of_names_has_every_public_name():
    page = reference.python()
    for name in secateur.__all__:
        assert name == "__version__" or f"### {name}\n" in page or f"`{name}`" in page
    assert "object at 0x" not in page
    assert str(Path.home()) not in page


def test_sections_of_docstrings_are_lists():
    text = "Raises:\n    InputError: it is\n        out of reach.\n    OSError: no disk."
    assert (
        section(text) == "**Raises**\n\n- `InputError`: it is out of reach.\n- `OSError`: no disk."
    )
    assert table(["a"], [["x | y\nz"]]) == "| a |\n| --- |\n| x \\| y z |\n"


def test_the_page_of_families_is_current():
    """Otherwise: python -m scripts.docs.families; methods of matrices take long, and have a row."""
    page, built = families.PAGE.read_text(), families.variants()
    narrowing = [m for m in map(built_of, METHODS) if m.kinds != MATRICES]
    assert families.shrinking(built) in page
    rows = families.serving(built, narrowing, families.asked(built, narrowing)).splitlines()
    assert set(rows) <= set(page.splitlines())
    assert re.findall(r"^\| `([\w-]+)` \| [^|`]+ \|", page, re.M) == list(METHODS)


@pytest.mark.slow
def test_the_whole_page_of_families_is_current():
    assert families.page() == families.PAGE.read_text()


def built_of(name):
    return method_class(name)()
