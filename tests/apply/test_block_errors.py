"""What is observed of blocks and units, against plain forward passes."""

import pytest
import torch

from secateur.apply.block_errors import POINTS, BlockComparison, holding, observations
from secateur.methods.auto import Auto
from secateur.methods.svd import SVD
from secateur.scoring.evidence import score
from tests.support import families
from tests.support.families import FAMILIES


def errors_of(comparison, model):
    for block in model.blocks:
        comparison.follow(block)
    return comparison.errors


every_family = pytest.mark.parametrize("name", FAMILIES)


@every_family
def test_an_unchanged_model_has_lost_nothing(opened, name):
    model = opened(name)
    errors = errors_of(BlockComparison(model, families.read(name, 3, 16)), model)
    assert len(errors) == len(model.blocks)
    for own in errors:
        assert set(own) == {"attention", "mlp", "stream"}
        assert all(value == 0 for value in own.values())


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_an_error_is_the_share_of_the_energy_that_is_lost(opened, name):
    """Where the MLP's last matrix is scaled by 0.9, a hundredth of what it adds is lost there."""
    model = opened(name, "float64")
    comparison = BlockComparison(model, families.read(name, 3, 16))
    last = model.blocks[-1]
    for parameter in last.mlp.consumer.parameters():
        parameter.data.mul_(0.9)
    errors = errors_of(comparison, model)
    assert errors[-1]["mlp"] == pytest.approx(0.01)
    assert errors[-1]["attention"] == 0
    assert all(value == 0 for own in errors[:-1] for value in own.values())
    assert errors[-1]["stream"] > 0


def test_errors_of_blocks_before_are_included(opened):
    """The mistake: every block judged on what the dense model gives it."""
    model = opened("llama", "float64")
    comparison = BlockComparison(model, families.read("llama", 3, 16))
    model.blocks[0].mlp.consumer.weight.data.mul_(0.5)
    errors = errors_of(comparison, model)
    assert errors[0]["attention"] == 0
    assert all(errors[1][part] > 0 for part in ("attention", "mlp", "stream"))


def test_a_block_that_is_gone_adds_nothing(opened):
    model = opened("llama", "float64")
    comparison = BlockComparison(model, families.read("llama", 3, 16))
    model.blocks[1].remove()
    errors = errors_of(comparison, model)
    assert errors[1]["attention"] == errors[1]["mlp"] == 1
    assert 0 < errors[1]["stream"] < 1


def test_padding_does_not_count(opened):
    """The mistake: states of what is no token compared, too."""
    from secateur.data.tokens import Tokens

    tokens = families.read("llama", 2, 16)
    mask = tokens.mask.clone()
    mask[:, 9:] = False
    half = Tokens(tokens.ids, mask, tokens.labels)
    found = []
    for given in (half, Tokens(tokens.ids[:, :9], mask[:, :9], tokens.labels)):
        model = opened("llama", "float64")
        comparison = BlockComparison(model, given)
        model.blocks[0].mlp.consumer.weight.data[:, ::2] = 0
        found.append(errors_of(comparison, model))
    for a, b in zip(*found, strict=True):
        assert a == pytest.approx(b)


def test_directions_hold_their_share():
    basis, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    energies = torch.tensor([49.0, 40.0, 9.5, 1.45, 0.04, 0.01], dtype=torch.float64)
    gram = basis @ energies.diag() @ basis.t()
    assert holding(gram) == {"0.5": 2, "0.9": 3, "0.99": 4, "0.999": 4, "of": 6}
    assert holding(torch.zeros(3, 3)) == {}
    assert holding(torch.eye(1)) == {"0.5": 1, "0.9": 1, "0.99": 1, "0.999": 1, "of": 1}


@pytest.mark.parametrize("method", [Auto(), SVD(rank_step=4)])
def test_curves_are_those_of_the_evidence_at_some_sizes(opened, calibrated, method):
    data, model = calibrated("llama"), opened("llama")
    evidence = score(model, method, data.store, data.tokens)
    units = method.units(model, 8)
    found = observations(units, len(model.blocks), data.store, evidence, [])
    assert len(found["influence"]) == len(found["directions"]) == len(model.blocks)
    assert set(found["curves"]) == {unit.name for unit in units}
    for unit in units:
        told = found["curves"][unit.name]
        assert 1 <= len(told["kept"]) == len(told["errors"]) <= POINTS
        assert told["kept"] == sorted(told["kept"])
        assert told["kept"][-1] == 1.0
        assert told["errors"][-1] == 0.0
        least = unit.sizes()[0]
        price = unit.cost(least, 2).bytes / unit.cost(unit.size, 2).bytes
        if unit.kind == "matrix":
            assert told["kept"][0] == pytest.approx(price, rel=1e-3)
        assert told["errors"][0] == pytest.approx(evidence.curves[unit.name].at(least), rel=1e-3)
