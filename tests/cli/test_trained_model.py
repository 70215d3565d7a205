"""A trained model, where one lies beside the repository: the numbers are those of a real model."""

import json

import pytest
from conftest import ROOT

DATA = ROOT.parent / "shared" / "data"
TRAINED = DATA / "models" / "stories260K"

pytestmark = pytest.mark.skipif(not TRAINED.is_dir(), reason="no trained model beside the project")


def test_a_trained_model_keeps_its_quality(secateur, room):
    given = ["--keep", "0.8", "--samples", "64", "--eval-windows", "64", "--no-speed", "--json"]
    texts = ["--calibration", DATA / "text" / "tinystories.calibration.txt"]
    texts += ["--eval", DATA / "text" / "tinystories.held.txt"]
    shown = secateur("compress", TRAINED, room / "out", *texts, *given).succeeded()
    report = json.loads(shown.out)
    (dense,) = report["dense"]["perplexity"].values()
    (small,) = report["compressed"]["perplexity"].values()
    assert dense == pytest.approx(5.412, rel=0.02)  # as transformers alone gives it
    assert dense <= small < 20
    assert 0.79 < report["budget"]["reached"] <= 0.8
    assert report["compressed"]["bytes"] < report["dense"]["bytes"]
