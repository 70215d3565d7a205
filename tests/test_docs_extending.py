"""docs/extending.md: its code is whole, imports what extensions may, and does what it says."""

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import secateur
from secateur import Budget, extend, make_plan, save, score
from secateur.methods import REGISTRY, method_class
from tests.contract.conftest import spread
from tests.support.families import FAMILIES

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
EXAMPLE = ROOT / "examples" / "secateur-example-method"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
CLASSES = {name: block for block in BLOCKS for name in re.findall(r"^class (\w+)", block, re.M)}
METHODS = ("energy", "halves", "loudest", "refitted")
USES = [block for block in BLOCKS if "compress(" in block]


def test_every_block_is_used_below():
    families = [block for block in BLOCKS if "families" in block]
    assert len(BLOCKS) == len(CLASSES) + len(USES) + len(families)
    assert list(CLASSES) == ["OutputNorm", "Energy", "Halves", "Loudest", "Refitted", "SpareEnds"]


def test_the_package_on_the_page_is_the_one_in_examples():
    assert CLASSES["OutputNorm"] == (EXAMPLE / "secateur_example_method.py").read_text()
    (declared,) = re.findall(r"^```toml\n(.*?)^```$", PAGE, re.M | re.S)
    assert declared == (EXAMPLE / "pyproject.toml").read_text()


@pytest.mark.parametrize("name", CLASSES)
def test_what_extensions_import_is_in_extend(name):
    nodes = ast.walk(ast.parse(CLASSES[name]))
    found = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    own = [node for node in found if node.module.split(".")[0] == "secateur"]
    assert [node.module for node in own] == ["secateur.extend"]
    assert {alias.name for alias in own[0].names} <= set(extend.__all__)


def test_extend_has_all_that_it_lists():
    assert len(set(extend.__all__)) == len(extend.__all__)
    assert all(hasattr(extend, name) for name in extend.__all__)
    shared = set(extend.__all__) & set(secateur.__all__)
    assert all(getattr(extend, name) is getattr(secateur, name) for name in shared)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The modules of the page in a package that declares their classes."""
    site = tmp_path_factory.mktemp("page")
    made = {name: name.lower() for name in CLASSES if name not in ("OutputNorm", "SpareEnds")}
    for name, module in made.items():
        (site / f"{module}.py").write_text(CLASSES[name])
    (site / "spare_ends.py").write_text(CLASSES["SpareEnds"])
    metadata = site / "of_the_page-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: of-the-page\nVersion: 1.0\n")
    entries = "".join(f"{module} = {module}:{name}\n" for name, module in made.items())
    (metadata / "entry_points.txt").write_text(f"[secateur.methods]\n{entries}")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        yield site
    for module in (*made.values(), "spare_ends"):
        sys.modules.pop(module, None)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("variant", ["llama", "gpt2"])
def test_methods_of_the_page_compress(opened, calibrated, tmp_path, name, variant):
    assert REGISTRY.package(name) == "of-the-page 1.0"
    model, data, method = opened(variant), calibrated(variant), method_class(name)()
    budget = Budget(keep=0.7).of(method)
    evidence = score(model, method, data.store, data.tokens)
    given = {"budget": budget, "store": data.store}
    plan = make_plan(model, method, evidence, data.record, data.tokens, **given)
    assert 0.5 < plan.budget.reached <= 0.7
    save(model, tmp_path / "small", plan, data.store, data.tokens)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.bfloat16)
    ids = data.tokens.ids[:2]
    with torch.inference_mode():
        found, expected = loaded(input_ids=ids).logits, model.module(input_ids=ids).logits.float()
    assert spread(found, expected) < 0.02  # the model in memory is left in bfloat16, too


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("block", USES, ids=["method", "allocator"])
def test_uses_of_the_page_run(block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "extending.md", "exec"), {})
    assert "perplexity" in capsys.readouterr().out
    assert (tmp_path / "small" / "config.json").is_file()


def test_a_family_of_the_page_is_one():
    (block,) = (block for block in BLOCKS if "families" in block)
    found = {}
    exec(compile(block, "extending.md", "exec"), found)
    family = found["GRANITE"]
    assert family.model_types == ("granite",)
    assert family.project is importlib.import_module("secateur.families.llama_like").LLAMA.project
    assert family.family not in FAMILIES
