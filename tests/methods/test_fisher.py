"""Fisher masks: gradients, search and rearrangement, and what they are worth."""

from itertools import combinations

import pytest
import torch

from secateur import (
    Budget,
    Calibration,
    calibration_tokens,
    open_model,
)
from secateur.apply.surgery import narrow_unit
from secateur.calibration.mask_gradients import FISHER, mask_gradients, view_of
from secateur.data.tokens import BUNDLED, Text, held_windows
from secateur.evaluate.perplexity import perplexity
from secateur.methods.fisher import FisherMask, rearranged
from secateur.methods.fitted import FitData, fit_within
from secateur.methods.step import Step
from secateur.structure.budget import Target
from secateur.structure.costs import counted
from secateur.structure.narrowing import Narrowing
from secateur.structure.selection import Selection
from secateur.utils.errors import InputError, RunError


def objective(gradients, gone, shrink):
    """Σ F'_ij over what is gone, from F itself."""
    fisher = gradients.mT @ gradients
    fisher = (1 - shrink) * fisher + shrink * torch.diag(fisher.diagonal())
    at = torch.tensor(sorted(gone))
    return float(fisher[at][:, at].sum())


def best(gradients, count, shrink):
    sets = combinations(range(gradients.shape[1]), count)
    return min(sets, key=lambda gone: objective(gradients, gone, shrink))


@pytest.mark.parametrize("shrink", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(6))
def test_rearranging_ends_where_no_exchange_helps(seed, shrink):
    torch.manual_seed(seed)
    gradients = torch.randn(12, 9, dtype=torch.float64)
    order = gradients.square().sum(0).argsort(descending=True)
    keep = rearranged(gradients, order[:5], shrink)
    gone = {*range(9)} - {*keep.tolist()}
    reached = objective(gradients, gone, shrink)
    assert len(gone) == 4
    assert keep.tolist() == sorted(keep.tolist())
    assert reached <= objective(gradients, {*order[5:].tolist()}, shrink) + 1e-9
    for out in gone:
        for other in keep.tolist():
            assert objective(gradients, gone - {out} | {other}, shrink) >= reached - 1e-9


def test_channels_that_make_up_for_each_other_go_together():
    """By their diagonal alone the third would go with one of the two: a loss of 4, not of 0."""
    gradients = torch.tensor([[2.0, -2.0, 1.9, 9.0], [2.0, -2.0, -1.9, 9.0]], dtype=torch.float64)
    order = gradients.square().sum(0).argsort(descending=True, stable=True)
    assert rearranged(gradients, order[:2], 1.0).tolist() != [2, 3]
    assert rearranged(gradients, order[:2], 0.0).tolist() == [2, 3]
    assert best(gradients, 2, 0.0) == (0, 1)


def test_gradients_are_those_of_scaling_what_is_read(opened, calibrated):
    """To scale a channel is to scale the weights that read it: Σ w ∂L/∂w, by autograd."""
    model, tokens = opened("llama", "float64"), calibrated("llama").tokens[:2]
    found = mask_gradients(model, tokens, FISHER.values())
    assert {site.side for _, site in found} == {"mask:mlp", "mask:heads"}
    views = [view_of(model.blocks[index], site) for index, site in found]
    weights = [view.reader.weight.requires_grad_() for view in views]
    for window in range(2):
        given = tokens[window : window + 1]
        with torch.enable_grad():
            total, count = model.use.loss(model.module(**model.use.inputs(given)).logits, given)
            slopes = torch.autograd.grad(total / count, weights)
        for view, weight, slope, rows in zip(views, weights, slopes, found.values(), strict=True):
            size, width, _ = view.read().shape
            expected = (weight * slope).sum(0).view(size, width).sum(1)
            assert rows.shape == (2, size)
            assert torch.allclose(rows[window], expected.detach(), rtol=1e-5, atol=1e-9)


def test_no_parameter_is_left_with_a_gradient(opened, calibrated):
    model = opened("llama")
    before = [p.requires_grad for p in model.module.parameters()]
    mask_gradients(model, calibrated("llama").tokens[:1], FISHER.values())
    assert [p.requires_grad for p in model.module.parameters()] == before
    assert all(p.grad is None for p in model.module.parameters())


@pytest.mark.parametrize("target", ["parameters", "flops", "cache"])
@pytest.mark.parametrize("keep", [0.6, 0.8, 1.0])
def test_the_budget_is_held(opened, calibrated, keep, target: Target):
    model, method = opened("llama"), FisherMask()
    units = method.units(model, 8)
    prices = counted(units, target, model.stored.itemsize)
    data, budget = FitData(calibrated("llama").tokens), prices.budget(units, keep)
    sizes, selection = fit_within(method, model, units, prices, budget, data=data)
    spent = prices.spent(units, sizes)
    assert spent <= budget
    grain = max(prices.of(u, u.size) - prices.of(u, u.sizes()[-2]) for u in units)
    assert budget - spent < grain
    assert all(sizes[unit.name] > 0 for unit in units)
    assert (keep < 1) == bool(selection.kept)


class Greedy(FisherMask):
    """Keeps everything but the last channel of the first MLP."""

    def fit(self, model, units, costs, budget, data):
        first = next(unit for unit in units if unit.kind == "mlp")
        return Selection({first.name: torch.arange(first.size - first.step)})


def test_what_is_above_its_budget_is_refused(opened, calibrated):
    model, method = opened("llama"), Greedy()
    units = method.units(model, 8)
    prices = counted(units, "parameters", 4)
    given = (method, model, units, prices, prices.budget(units, 0.5))
    with pytest.raises(RunError, match="above its budget"):
        fit_within(*given, data=FitData(calibrated("llama").tokens))


def test_it_takes_no_allocator_and_no_plain_tier():
    from secateur.allocate.uniform import Uniform

    with pytest.raises(InputError, match=r"decides all sizes itself.*--allocator uniform"):
        Step.of(FisherMask(), Budget(), Uniform())
    with pytest.raises(InputError, match="--tier per-layer"):
        Step.of(FisherMask(), Budget(tier="plain"))


def kept_by_magnitude(model, sizes, units):
    """Of each unit the channels or heads whose reading weights are largest."""
    for unit in units:
        if sizes[unit.name] < unit.size:
            block = model.blocks[unit.block]
            norms = block.axis(unit).read().square().sum((1, 2))
            keep = norms.topk(sizes[unit.name]).indices.sort().values
            narrow_unit(block, unit, Narrowing(keep=keep))


def test_it_beats_magnitude_at_the_same_sizes_on_kept_back_text():
    """Without its refit, so that only what is chosen differs."""
    model, method = open_model("demo"), FisherMask(refit=0)
    calibration = Calibration(samples=12, length=96)
    tokens = calibration_tokens(calibration, model.tokenizer)
    held = held_windows(Text("bundled", BUNDLED), model.tokenizer, 96, 12)
    units = method.units(model, 8)
    prices = counted(units, "parameters", model.stored.itemsize)
    given = (method, model, units, prices, prices.budget(units, 0.75))
    sizes, selection = fit_within(*given, data=FitData(tokens))
    other = open_model("demo")
    kept_by_magnitude(other, sizes, units)
    for unit in units:
        if (keep := selection.kept.get(unit.name)) is not None:
            narrow_unit(model.blocks[unit.block], unit, Narrowing(keep=keep))
    assert perplexity(model.module, held) < 0.9 * perplexity(other.module, held)
