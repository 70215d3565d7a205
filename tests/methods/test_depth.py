"""Whole blocks: what is measured of them, what they cost, and which go first."""

from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from secateur import Budget, InputError, make_plan
from secateur.allocate.base import Evidence
from secateur.allocate.greedy import Greedy
from secateur.allocate.knapsack import Knapsack
from secateur.allocate.least_error import LeastError
from secateur.calibration.needs import Needs
from secateur.calibration.statistics import Change, Influence
from secateur.data.tokens import Calibration, Tokens
from secateur.methods.replace import Replace
from secateur.methods.shortgpt import ShortGPT
from secateur.methods.sleb import SLEB
from secateur.pipeline.compress_stage import write
from secateur.pipeline.context import RunContext
from secateur.scoring.evidence import score
from secateur.scoring.latency import measured
from secateur.scoring.prices import prices_of
from secateur.structure.error_curve import Curve
from secateur.structure.units import WIDTHS
from tests.contract.conftest import logits, spread
from tests.support import families
from tests.support.blocks import IDS, changes, every_family, gone, measure, padded, units_of
from tests.support.steps import prepared_of

# Statistics


def test_influence_and_change_are_those_of_real_tokens(opened):
    """The mistake: padding counts."""
    model, tokens = opened("llama", "float64"), padded()
    _, store = measure(model, Replace(), tokens)
    for block, (x, y) in zip(model.blocks, changes(model, tokens), strict=True):
        found = store.get(block.index, [Needs.INFLUENCE, Needs.CHANGE])
        influence = 1 - torch.cosine_similarity(x, y, -1).mean()
        assert float(found[Needs.INFLUENCE].mean) == pytest.approx(float(influence), rel=1e-9)
        energies = torch.stack(((y - x).square().sum(1).mean(), y.square().sum(1).mean()))
        expected = torch.cat(((y - x).mean(0), energies))
        torch.testing.assert_close(found[Needs.CHANGE].mean, expected)
    _, wrong = measure(model, Replace(), Tokens(tokens.ids, torch.ones_like(tokens.mask)))
    for need, right in found.items():
        assert not torch.allclose(wrong.get(2, [need])[need].mean, right.mean, rtol=1e-3)


@pytest.mark.parametrize("kind", [Change, Influence])
def test_block_statistics_merge(kind):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(4, 5, 3, generator=generator) for _ in range(2))
    mask = torch.rand(4, 5, generator=generator) < 0.7
    whole, one, other = kind(), kind(), kind()
    whole.update(x, y, mask=mask)
    one.update(x[:1], y[:1], mask=mask[:1])
    other.update(x[1:], y[1:], mask=mask[1:])
    one.merge(other)
    torch.testing.assert_close(one.mean, whole.mean)


# Which goes first


def idle(block):
    """Let a block add nothing."""
    for linear in (block.mlp.consumer, block.attention.module.o_proj):
        linear.weight.zero_()
        if linear.bias is not None:
            linear.bias.zero_()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("method", [ShortGPT, SLEB, Replace])
def test_an_idle_block_goes_first_and_is_free(opened, tmp_path, name, method):
    model, made = opened(name), method()
    idle(model.blocks[1])
    dense = logits(model.module, IDS)
    tokens, store = measure(model, made)
    evidence = score(model, made, store, tokens)
    assert evidence.curves["layers.1.block"].at(0) == pytest.approx(0, abs=1e-12)
    others = [u for u in made.units(model, 1) if u.block != 1 and not u.fixed]
    assert min(evidence.curves[unit.name].at(0) for unit in others) > 1e-3
    record = Calibration("stream", 6, 32, 0)
    budget = Budget(keep=0.7)
    plan = make_plan(model, made, evidence, record, tokens, budget=budget, store=store)
    assert plan.sizes == gone(model, 1)
    prepared = prepared_of(model, SimpleNamespace(tokens=tokens, store=store), plan)
    write(prepared, tmp_path / "small", RunContext())
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32).eval()
    assert spread(logits(small, IDS), dense) < 1e-5


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.67, 0.9, 1.0])
@pytest.mark.parametrize("prices", [[10] * 6, [10, 7, 9, 10, 3, 8]])
def test_least_error_is_that_of_all_choices(keep, prices):
    units, table = units_of(prices)
    errors = [0.31, 0.05, 0.12, 0.07, 0.02, 0.4]
    curves = {u.name: Curve((e, 0.0)) for u, e in zip(units, errors, strict=True)}
    found = LeastError().allocate(units, Evidence(curves), table, keep)
    budget, least = int(keep * sum(prices)), float("inf")
    for count in range(7):
        for left in combinations(range(6), count):
            if sum(prices[i] for i in left) <= budget:
                least = min(least, sum(e for i, e in enumerate(errors) if i not in left))
    assert table.spent(units, found) <= budget
    lost = sum(e for u, e in zip(units, errors, strict=True) if not found[u.name])
    assert lost == pytest.approx(least)


@pytest.mark.parametrize("allocator", [LeastError(), Greedy(ends=0), Knapsack()])
def test_one_block_has_to_stay(allocator):
    units, table = units_of([10] * 6)
    curves = {u.name: Curve((0.1, 0.0)) for u in units}
    evidence = Evidence(curves, losses=curves, judge=lambda sizes: 0.0)
    with pytest.raises(InputError, match=r"0\.167"):
        allocator.allocate(units, evidence, table, 0.16)
    assert sum(allocator.allocate(units, evidence, table, 0.17).values()) == 1


# What it costs


@every_family
def test_a_block_costs_what_its_units_do(opened, name):
    model = opened(name)
    units = ShortGPT().units(model, 8)
    assert [unit.name for unit in units] == [f"layers.{i}.block" for i in range(3)]
    parts = model.units(1, ("mlp", "heads"))
    for unit in units:
        own = [part.cost(part.size, 4) for part in parts if part.block == unit.block]
        if len(own) < 2:
            continue  # heads that stay are no unit of their own
        for field in ("parameters", "bytes", "flops_per_token", "cache_bytes_per_token"):
            assert getattr(unit.cost(1, 4), field) == sum(getattr(o, field) for o in own)
            assert getattr(unit.cost(0, 4), field) == 0
    widths = model.units(1, WIDTHS)
    if name not in families.NORMED:
        total = sum(unit.parameters(unit.size) for unit in widths)
        assert total == sum(unit.parameters(1) for unit in units)


@pytest.mark.parametrize("target", ["parameters", "bytes", "flops", "cache", "latency"])
def test_every_target_has_prices_of_blocks(opened, target):
    model = opened("llama")
    units = ShortGPT().units(model, 8)
    budget, latency = Budget(target=target, length=16), target == "latency"
    prices = (measured if latency else prices_of)(model, units, budget)
    assert all(prices.of(unit, 0) == 0 < prices.of(unit, 1) for unit in units)
    evidence = Evidence({unit.name: Curve((0.1 + unit.block, 0.0)) for unit in units})
    keep = (prices.fixed + 2.01 * prices.of(units[0], 1)) / prices.whole(units)
    assert LeastError().allocate(units, evidence, prices, min(keep, 1)) == gone(model, 0)
