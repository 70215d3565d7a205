"""A result names what it kept, and its plan applies exactly that again."""

import json

import pytest
import torch
from safetensors.torch import load_file

from secateur import (
    Budget,
    Calibration,
    InputError,
    Questions,
    Text,
    compress,
    make_plan,
    read_plan,
    score,
    write_plan,
)
from secateur.methods import method_class
from secateur.pipeline.compress_stage import write
from secateur.pipeline.context import RunContext
from secateur.planning.checks import check_sizes
from secateur.structure.selection import Selection
from tests.support.families import words
from tests.support.steps import prepared_of


def planned(model, data, method, keep=0.6):
    evidence = score(model, method, data.store, data.tokens)
    budget = Budget(keep=keep, target="parameters")
    given = (model, method, evidence, data.record, data.tokens)
    return make_plan(*given, budget=budget, store=data.store)


def written(opened, data, plan, folder):
    """The weights that a plan gives, and the plan as it is afterwards."""
    model = opened("llama")
    check_sizes(plan, model, plan.build_method())
    prepared = prepared_of(model, data, plan)
    write(prepared, folder, RunContext())
    return (folder / "model.safetensors").read_bytes(), prepared.plan


@pytest.mark.parametrize("method", ["flap", "wanda-sp", "ziplm", "modegpt", "auto", "fisher"])
def test_a_plan_is_applied_again_to_the_byte(opened, calibrated, tmp_path, method):
    data = calibrated("llama")
    plan = planned(opened("llama"), data, method_class(method)())
    weights, kept = written(opened, data, plan, tmp_path / "first")
    assert kept.selection is not None
    smaller = {row.unit for row in kept.units if row.after < row.before}
    selects = {row.unit for row in kept.units if row.kind in method_class(method).selects}
    assert {*kept.selected.kept} == smaller & selects
    write_plan(kept, tmp_path / "plan.json")
    again, replayed = written(opened, data, read_plan(tmp_path / "plan.json"), tmp_path / "again")
    assert again == weights
    assert replayed == kept


def test_other_indices_are_applied_as_they_are(opened, calibrated, tmp_path):
    data, method = calibrated("llama"), method_class("wanda-sp")()
    dense = opened("llama").module.state_dict()
    plan = planned(opened("llama"), data, method)
    sizes = {u: s for u, s in plan.sizes.items() if u.endswith("mlp")}
    told = {unit: torch.arange(size) + 1 for unit, size in sizes.items()}
    _, kept = written(opened, data, plan.with_selection(Selection(told)), tmp_path / "told")
    found = load_file(tmp_path / "told" / "model.safetensors")
    for unit, keep in told.items():
        own = f"model.{unit.removesuffix('.mlp')}.mlp"
        for name, at in (("gate_proj", keep), ("up_proj", keep)):
            expected = dense[f"{own}.{name}.weight"][at]
            assert torch.equal(found[f"{own}.{name}.weight"].to(expected), expected)
        assert torch.equal(kept.selected.kept[unit], keep)


def test_an_edited_size_is_refused_until_the_selection_is_dropped(opened, calibrated, tmp_path):
    data, model = calibrated("llama"), opened("llama")
    plan = planned(model, data, method_class("fisher")())
    write_plan(plan, tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    row = next(r for r in content["units"] if r["kind"] == "mlp" and r["after"] < r["before"])
    row["after"] -= 8
    (tmp_path / "plan.json").write_text(json.dumps(content))
    method = method_class("fisher")()
    with pytest.raises(InputError, match=rf"{row['unit']}.*selection keeps {row['after'] + 8}"):
        check_sizes(read_plan(tmp_path / "plan.json"), model, method)
    content["selection"] = None
    (tmp_path / "plan.json").write_text(json.dumps(content))
    check_sizes(read_plan(tmp_path / "plan.json"), model, method)


def test_a_method_that_mixes_coordinates_refuses_indices(opened, calibrated):
    data, model = calibrated("llama"), opened("llama")
    method = method_class("modegpt")()
    plan = planned(model, data, method)
    unit = next(r.unit for r in plan.units if r.kind == "value_output" and r.after < r.before)
    told = plan.with_selection(Selection({unit: torch.arange(plan.sizes[unit])}))
    with pytest.raises(InputError, match="has no indices"):
        check_sizes(told, model, method)


def test_a_plan_without_its_file_says_so(opened, calibrated, tmp_path):
    data = calibrated("llama")
    plan = planned(opened("llama"), data, method_class("fisher")())
    (tmp_path / "plan.json").write_text(plan.to_json())
    with pytest.raises(InputError, match=r"is missing.*set `selection` to null"):
        read_plan(tmp_path / "plan.json")


def test_a_run_leaves_the_selection_beside_its_plan(dense, tmp_path):
    (tmp_path / "words.txt").write_text(words(1500))
    text, out = str(tmp_path / "words.txt"), tmp_path / "small"
    asked = {
        "calibration": Calibration(text, 8, 32, 0),
        "questions": Questions((Text("words", text, 0.8),), 32, 4, new_tokens=4, speed=False),
    }
    report = compress(dense("llama"), out, method_class("fisher")(), Budget(keep=0.7), **asked)
    assert report["budget"]["reached"] <= 0.7
    assert report["allocator"] is None
    plan = read_plan(out / "secateur" / "plan.json")
    assert plan.selected is not None
    again = tmp_path / "again"
    compress(dense("llama"), again, plan, questions=asked["questions"])
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert read_plan(again / "secateur" / "plan.json").selection == plan.selection
