"""Nothing removed means nothing changed."""

import pytest
import torch

from secateur.evaluate.verify import attend_by
from tests.contract.conftest import logits, spread
from tests.support.families import FAMILIES, attentions, read

every_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.mark.parametrize(
    ("name", "attention"), [(name, kind) for name in FAMILIES for kind in attentions(name)]
)
def test_canonical_blocks_give_the_dense_logits(opened, name, attention):
    model = opened(name, "float64")
    attend_by(model.module, attention)
    given = read(name, 1, 30)
    before = logits(model.module, given)
    assert len(model.blocks) == 3
    assert spread(logits(model.module, given), before) < 1e-5


@every_family
def test_keep_one_is_plain_and_gives_the_dense_logits(readings, opened, written, name):
    made, found = written(name, "full"), readings("stranger")(name, "full")
    assert made.plan.tier == "plain"
    assert made.plan.budget.reached == 1
    assert not found.facts["class"].startswith("Secateur")
    assert not (made.folder / "modeling_secateur.py").exists()
    model = opened(name).module
    for attention in attentions(name):
        attend_by(model, attention)
        dense = logits(model, made.tokens)[0]
        assert spread(found.tensors[f"logits.{attention}"], dense) < 1e-6


@every_family
def test_keep_one_writes_every_dense_tensor_unchanged(dense, written, name):
    from safetensors.torch import load_file

    before = load_file(dense(name) / "model.safetensors")
    after = load_file(written(name, "full").folder / "model.safetensors")
    assert set(before) == set(after)
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]), key
