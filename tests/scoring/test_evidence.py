"""Scores on disk: read back whole, or not at all."""

import json
from dataclasses import replace

import pytest
import torch

from secateur import Calibration, Settings
from secateur.allocate.base import Evidence
from secateur.allocate.fluctuation import Fluctuation
from secateur.allocate.influence import EntropicInfluence
from secateur.allocate.knapsack import Knapsack
from secateur.data.tokens import Tokens
from secateur.io.cache import cached_file
from secateur.methods.auto import Auto
from secateur.methods.modegpt import MoDeGPT
from secateur.pipeline import prepare
from secateur.pipeline.context import RunContext
from secateur.pipeline.run_inputs import Inputs
from secateur.scoring import evidence as module
from secateur.scoring.evidence import identity, keep_evidence, kept_evidence, score
from secateur.structure.error_curve import Curve
from secateur.structure.units import MLP
from secateur.utils.errors import InputError
from tests.support.steps import step_of


@pytest.fixture(autouse=True)
def cache_folder(monkeypatch, tmp_path):
    """Where this test's cache is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "secateur" / "scores"


@pytest.fixture(scope="module")
def model(opened):
    return opened("llama")


@pytest.fixture(scope="module")
def tokens(calibrated):
    return calibrated("llama").tokens


@pytest.fixture(scope="module")
def evidence(model, tokens, calibrated):
    return score(model, Auto(), calibrated("llama").store, tokens)


@pytest.fixture(scope="module")
def units(model):
    return model.units(1)


@pytest.fixture
def own(model, tokens):
    return identity(model, Auto(), tokens, Knapsack())


@pytest.fixture
def file(own, evidence, tmp_path):
    keep_evidence(own, evidence, tmp_path / "scores.json")
    return tmp_path / "scores.json"


def assert_same(found, expected):
    assert found.curves == expected.curves
    assert found.losses == expected.losses
    assert tuple(found.readings) == tuple(expected.readings)


def test_scores_are_read_back_to_the_last_bit(units, own, evidence, file):
    assert any(0 < loss < 1e-2 for curve in evidence.losses.values() for loss in curve.errors)
    assert_same(kept_evidence(own, units, file), evidence)
    odd = Evidence({"a": Curve((1.0, 0.1 + 0.2, 5e-324, 0.0))}, ((1 / 3, 0.7),), None)
    keep_evidence(own | {"measured": False}, odd, file)
    unit = MLP("a", 0, 3, 1, 8, 2, 0)
    assert_same(kept_evidence(own | {"measured": False}, [unit], file), odd)


def test_the_cache_lies_where_the_environment_says(units, own, evidence, cache_folder):
    assert kept_evidence(own, units, None) is None
    keep_evidence(own, evidence, None)
    (written,) = cache_folder.iterdir()
    assert written == cached_file("scores", own)
    assert_same(kept_evidence(own, units, None), evidence)


def test_no_file_yet_is_no_error(units, own, tmp_path):
    assert kept_evidence(own, units, tmp_path / "none.json") is None


def others(opened, model, tokens):
    """Of something else in one field each: field, identity there, what tells the two apart."""
    spending, fewer = Knapsack(), Tokens(tokens.ids[1:], tokens.mask[1:])
    here = identity(model, Auto(), tokens, spending)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SINCE", "0.0.1")
        older = identity(model, Auto(), tokens, spending)
    yield "model", identity(opened("qwen2"), Auto(), tokens, spending)
    yield "calibration", identity(model, Auto(), fewer, spending)
    yield "method", here | {"method": "modegpt"}
    yield "options", identity(model, Auto(ridge=0.0625), tokens, spending)
    yield "options", identity(model, Auto(iterations=7), tokens, spending)
    yield "secateur", older
    yield "measured", identity(model, Auto(), tokens, EntropicInfluence())
    yield "reading", identity(model, Auto(), tokens, Fluctuation()) | {"measured": True}


def test_scores_of_something_else_are_refused_with_both_values(
    units, opened, model, tokens, own, evidence, file
):
    for field, there in others(opened, model, tokens):
        assert there != own
        assert [name for name in own if own[name] != there[name]] == [field]
        keep_evidence(there, evidence, file)
        with pytest.raises(InputError, match=r"scores\.json") as caught:
            kept_evidence(own, units, file)
        message = str(caught.value)
        assert f"{field} is {there[field]!r} there and {own[field]!r} here" in message


def test_the_cache_keeps_scores_of_different_things_apart(
    units, opened, model, tokens, own, evidence
):
    there = [identity for _, identity in others(opened, model, tokens)]
    for number, one in enumerate(there):
        keep_evidence(one, replace(evidence, readings=((float(number),),) * 3), None)
    assert kept_evidence(own, units, None) is None
    for number, one in enumerate(there):
        assert kept_evidence(one, units, None).readings == ((number,),) * 3


def test_one_changed_weight_is_another_model(opened, tokens, own):
    changed = opened("llama")
    with torch.no_grad():
        changed.blocks[2].mlp.consumer.weight[0, 0] += 1
    assert identity(changed, Auto(), tokens, Knapsack())["model"] != own["model"]


DAMAGES = {
    "cut short": (lambda text: text[: len(text) // 2], "not JSON"),
    "empty": (lambda _: "", "not JSON"),
    "of another kind": (lambda _: "[1, 2]", "the file"),
    "without curves": (lambda text: edited(text, curves=None), "curves"),
    "lacking a field": (lambda text: edited(text, drop="readings"), "readings"),
    "with a word for a number": (lambda text: edited(text, readings=[["much"]]), "readings.0.0"),
    "with more fields": (lambda text: edited(text, more=1), "more"),
    "of a later version": (lambda text: edited(text, version=3), "version"),
}


def edited(text, drop="", **fields):
    return json.dumps({k: v for k, v in (json.loads(text) | fields).items() if k != drop})


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_and_a_damaged_cache_is_not_there(
    units, own, evidence, file, damage
):
    damaged, told = DAMAGES[damage]
    file.write_text(damaged(file.read_text()))
    before = file.read_bytes()
    with pytest.raises(InputError, match=told) as caught:
        kept_evidence(own, units, file)
    assert str(file) in str(caught.value)
    assert file.read_bytes() == before
    keep_evidence(own, evidence, None)
    cached = cached_file("scores", own)
    cached.write_text(damaged(cached.read_text()))
    assert kept_evidence(own, units, None) is None
    keep_evidence(own, evidence, None)
    assert_same(kept_evidence(own, units, None), evidence)


def test_what_is_no_file_or_no_text_is_refused(units, own, file, tmp_path):
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"scores\.json"):
        kept_evidence(own, units, file)
    with pytest.raises(InputError, match="no file"):
        kept_evidence(own, units, tmp_path)


def test_a_file_larger_than_any_scores_is_not_read(units, monkeypatch, own, file):
    monkeypatch.setattr(module, "MAX_BYTES", 100)
    with pytest.raises(InputError, match="larger"):
        kept_evidence(own, units, file)


def test_scores_with_losses_serve_an_allocator_without(units, model, tokens, evidence, file):
    assert Knapsack().measured
    assert not EntropicInfluence().measured
    without = identity(model, Auto(), tokens, EntropicInfluence())
    assert_same(kept_evidence(without, units, file), evidence)
    keep_evidence(without, replace(evidence, losses=None), file)
    assert kept_evidence(without, units, file).losses is None


def test_keep_does_not_matter(units, model, tokens, evidence, file):
    own = identity(model, Auto(), tokens, Knapsack())
    assert "keep" not in own["options"]
    assert_same(kept_evidence(own, units, file), evidence)
    keep_evidence(own, evidence, None)
    assert kept_evidence(own, units, None) is not None


def test_scores_are_measured_once_for_all_budgets(
    monkeypatch, dense, calibrated, tmp_path, cache_folder
):
    """And again only where the method differs or the cache is damaged."""
    data, measured = calibrated("llama"), []

    def counting(model, method, *rest, **named):
        measured.append(method.name)
        return score(model, method, *rest, **named)

    monkeypatch.setattr(prepare, "score", counting)

    settings = Settings(device="cpu", dtype="float32")
    text = Calibration("stream", 6, 32, 0)
    inputs = Inputs(str(dense("llama")), text, data.tokens, settings)

    def plan(method, keep=None, scores=None, **budget):
        step, given = step_of(method, keep, **budget), {"store": data.store, "scores": scores}
        prepared = prepare.prepare(inputs, step, RunContext(), **given, only_plan=True)
        return prepared.plan

    first = plan(Auto(), 0.7)
    assert measured == ["auto"]
    assert plan(Auto(), 0.7) == first
    assert plan(Auto(), 0.5, target="cache", multiple_of=1).sizes != first.sizes
    assert measured == ["auto"]
    plan(MoDeGPT())
    assert measured == ["auto", "modegpt"]
    for file in cache_folder.iterdir():
        file.write_text("{")
    assert plan(Auto(), 0.7) == first
    assert measured == ["auto", "modegpt", "auto"]
    named = tmp_path / "named.json"
    plan(Auto(), 0.7, scores=named)
    assert named.exists()
    assert measured == ["auto", "modegpt", "auto", "auto"]
    assert plan(Auto(), 0.7, scores=named) == first
    with pytest.raises(InputError, match="method is 'auto' there and 'modegpt' here"):
        plan(MoDeGPT(), scores=named)
    assert len(measured) == 4


def test_curves_of_other_units_are_refused(own, units, evidence, file):
    short = {name: Curve(curve.errors[1:]) for name, curve in evidence.curves.items()}
    for field in ("curves", "losses"):
        keep_evidence(own, replace(evidence, **{field: short}), file)
        with pytest.raises(InputError, match=f"{field} don't match"):
            kept_evidence(own, units, file)
