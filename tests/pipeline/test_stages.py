"""Stages in a recipe: compressing, exporting, and one of somebody else's."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from secateur import (
    SVD,
    Budget,
    Calibration,
    DenseExport,
    InputError,
    MoDeGPT,
    Questions,
    Recipe,
    Settings,
    StageResult,
    Step,
    Text,
    compress,
)
from secateur.pipeline.context import RunContext
from tests.support.families import words

CPU = Settings(device="cpu")


@dataclass(frozen=True)
class Scaled:
    """Multiplies the last norm: a stage that is neither a method nor an export."""

    by: float
    name: str = "scaled"

    def as_dict(self):
        return {"stage": self.name, "by": self.by}

    def run(self, source, out, context):
        context.progress.say(f"scaling {Path(source).name}")
        shutil.copytree(source, out)
        (file,) = out.glob("model*.safetensors")
        tensors = load_file(file)
        tensors["model.norm.weight"] = tensors["model.norm.weight"] * self.by
        save_file(tensors, file, {"format": "pt"})
        return StageResult()


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """What all runs have in common."""
    text = tmp_path_factory.mktemp("text") / "words.txt"
    text.write_text(words(1500))
    return {
        "calibration": Calibration(str(text), 6, 32, 0),
        "questions": Questions((Text("words", str(text), 0.8),), 32, 2, new_tokens=2, speed=False),
        "settings": CPU,
    }


def norm(folder):
    return load_file(folder / "model.safetensors")["model.norm.weight"]


def step(keep=0.8):
    return Step.of(MoDeGPT(), Budget(keep=keep, multiple_of=2))


@pytest.mark.parametrize("first", [False, True])
def test_a_recipe_holds_any_stage(dense, tmp_path, given, first):
    """In any place; the mistakes: it is skipped, or the report is of what it has left."""
    folder, out, own = Path(dense("llama")), tmp_path / "out", Scaled(2.0)
    steps = (own, step()) if first else (step(), own)
    report = compress(folder, out, Recipe(steps), **given)
    expected = norm(folder) * 2
    if not first:  # nothing else touches the last norm
        assert torch.equal(norm(out), expected.to(norm(out)))
    plain = compress(folder, tmp_path / "plain", Recipe((step(),)), **given)
    assert not torch.equal(norm(out), norm(tmp_path / "plain"))
    assert report["model"] == plain["model"]
    assert report["budget"]["reached"] == plain["budget"]["reached"]
    recorded = yaml.safe_load((out / "secateur" / "recipe.yaml").read_text())
    assert own.as_dict() in recorded["steps"]
    assert json.loads((out / "secateur" / "plan.json").read_text())["method"]["name"] == "modegpt"


def test_a_stage_that_was_done_is_not_done_again(dense, tmp_path, given):
    """A run killed behind it goes on with what it wrote."""
    seen = []

    @dataclass(frozen=True)
    class Counted(Scaled):
        def run(self, source, out, context):
            seen.append(self.name)
            return super().run(source, out, context)

    @dataclass(frozen=True)
    class Killed(Scaled):
        def run(self, source, out, context):
            seen.append(self.name)
            if seen.count(self.name) == 1:
                raise KeyboardInterrupt
            return super().run(source, out, context)

    recipe = Recipe((Counted(2.0, "counted"), step(), Killed(0.5, "killed")))
    with pytest.raises(KeyboardInterrupt):
        compress(dense("llama"), tmp_path / "out", recipe, **given)
    compress(dense("llama"), tmp_path / "out", recipe, **given)
    assert seen == ["counted", "killed", "killed"]
    assert torch.equal(norm(tmp_path / "out"), norm(Path(dense("llama"))))


def test_another_stage_is_another_run(dense, tmp_path, given):
    """What a stage is asked for is part of the run's fingerprint."""

    @dataclass(frozen=True)
    class Killed(Scaled):
        def run(self, source, out, context):
            raise KeyboardInterrupt

    first, other = (Recipe((step(), Killed(by))) for by in (2.0, 3.0))
    with pytest.raises(KeyboardInterrupt):
        compress(dense("llama"), tmp_path / "out", first, **given)
    with pytest.raises(InputError, match="another step"):
        compress(dense("llama"), tmp_path / "out", other, **given)


def test_an_export_is_a_stage(dense, tmp_path, given):
    """Low rank, then multiplied out: what is written is dense again."""
    low = Step.of(SVD(rank_step=2), Budget(keep=0.6))
    compress(dense("llama"), tmp_path / "out", Recipe((low, DenseExport(CPU))), **given)
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert names == load_file(Path(dense("llama")) / "model.safetensors").keys()
    with pytest.raises(InputError, match="dense already"):
        DenseExport(CPU).run(str(dense("llama")), tmp_path / "again", RunContext())


def test_a_recipe_has_a_method(dense):
    with pytest.raises(InputError, match="none of its steps has a method"):
        Recipe((Scaled(2.0),))
    with pytest.raises(InputError, match="how much modegpt keeps"):
        Recipe((Scaled(2.0), Step.of(MoDeGPT())))
    assert Recipe((Scaled(2.0), Step.of(MoDeGPT())), 0.5).open == 1


def test_what_excludes_each_other_is_refused(dense, tmp_path, given):
    recipe = Recipe((step(),))
    for beside in ({"scores": tmp_path / "s"}, {"statistics": tmp_path}):
        with pytest.raises(InputError, match=r"of a recipe bring their own"):
            compress(dense("llama"), tmp_path / "out", recipe, **given, **beside)
    with pytest.raises(InputError, match="`keep` alone"):
        compress(dense("llama"), tmp_path / "out", recipe, Budget(target="bytes"), **given)
    with pytest.raises(TypeError, match="unexpected keyword argument 'keep'"):
        compress(dense("llama"), tmp_path / "out", MoDeGPT(), keep=0.8)
    assert recipe.with_budget(Budget(keep=0.5)) == replace(recipe, keep=0.5)


def test_a_keep_among_the_options_of_a_method_says_where_it_goes():
    with pytest.raises(InputError, match=r"MoDeGPT\(\), Budget\(keep=0.8\)"):
        MoDeGPT(keep=0.8)
    with pytest.raises(InputError, match="by name"):  # it was the first of all options
        MoDeGPT(0.8)
