"""The search over whole blocks, against every choice, and its judge."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from secateur import Budget, InputError, MoDeGPT, make_plan
from secateur.allocate.base import Evidence
from secateur.allocate.greedy import Greedy
from secateur.calibration.layer_stream import Stream
from secateur.methods.sleb import SLEB
from secateur.scoring.evidence import score
from secateur.scoring.plan_scoring import PlanScorer
from secateur.structure.costs import counted
from secateur.structure.units import WIDTHS
from tests.support import families
from tests.support.blocks import gone, measure, units_of


@pytest.fixture
def judged(opened):
    """A deeper model, a judge of which blocks it can spare, and the same without reuse."""
    torch.manual_seed(1)
    options = families.FAMILIES["llama"].options | {"num_hidden_layers": 6}
    module = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**options))
    module = module.eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.mul_(1 + torch.rand(()))
    model, made = opened("llama"), SLEB()
    model.module = module
    tokens, store = measure(model, made)
    units = made.units(model, 1)

    def fresh():
        allowed = {u.name: [0, 1] for u in units}
        return PlanScorer(model, made, units, allowed=allowed, store=store, tokens=tokens)

    return model, units, fresh


def test_a_judge_says_the_same_in_any_order(judged):
    """The mistake: states kept from another plan."""
    model, _, fresh = judged
    plans = [(1,), (2,), (2, 4), (2, 4), (1, 4), (5,), (), (0, 5), (0, 4)]
    assert len(model.blocks) == 6
    judge, found = fresh(), []
    for plan in plans:
        found.append(judge(gone(model, *plan)))
    expected = [fresh()(gone(model, *plan)) for plan in plans]
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert found[6] == pytest.approx(0, abs=1e-6)
    assert len({round(value, 6) for value in found}) == len(plans) - 1


def test_a_judge_runs_only_what_differs(judged, monkeypatch):
    model, _, fresh = judged
    judge, ran = fresh(), []
    judge(gone(model, 0))
    through = Stream.through
    monkeypatch.setattr(
        Stream, "through", lambda self, b, s: ran.append(b.index) or through(self, b, s)
    )
    for index in range(1, 5):
        judge(gone(model, index))
    batches = len(judge._divergence.stream.batches)
    # all; block 0, then from 1 on; 1, then from 2 on; 2, then from 3 on
    assert len(ran) == batches * (6 + (1 + 5) + (1 + 4) + (1 + 3))


@pytest.mark.parametrize("ends", [0, 1])
def test_one_block_is_that_of_the_exhaustive_search(judged, ends):
    model, units, fresh = judged
    prices, judge = counted(units, "parameters", 4), fresh()
    found = Greedy(ends=ends).allocate(units, Evidence({}, judge=judge), prices, 0.84)
    losses = {i: judge(gone(model, i)) for i in range(ends, 6 - ends)}
    assert found == gone(model, min(losses, key=losses.get))


def test_greedy_judges_anew_after_every_block(judged):
    """The mistake: an order made once, which removes two blocks that stand in for one another."""
    units, prices = units_of([10] * 6)
    alone = [9, 1, 2, 3, 4, 9]

    def judge(sizes):
        left = [sizes[u.name] for u in units]
        twins = 100 if not left[1] and not left[2] else 0
        return twins + sum(a for a, size in zip(alone, left, strict=True) if not size)

    found = Greedy().allocate(units, Evidence({}, judge=judge), prices, 0.67)
    assert list(found.values()) == [1, 0, 1, 0, 1, 1]
    model, units, fresh = judged
    judge, prices, without = fresh(), counted(units, "parameters", 4), ()
    for _ in range(3):
        losses = {i: judge(gone(model, *without, i)) for i in range(1, 5) if i not in without}
        without = (*without, min(losses, key=losses.get))
    assert Greedy().allocate(units, Evidence({}, judge=fresh()), prices, 0.5) == gone(
        model, *without
    )


@pytest.mark.parametrize("ends", [0, 1])
@pytest.mark.parametrize("keep", [0.35, 0.5, 0.67, 0.9, 1.0])
def test_greedy_knows_how_often_it_will_ask(ends, keep):
    (units, prices), asked = units_of([10] * 6), []
    evidence = Evidence({}, judge=lambda sizes: asked.append(sizes) or float(len(asked)))
    Greedy(ends=ends).allocate(units, evidence, prices, keep)
    assert Greedy(ends=ends).judgements(units, prices, keep) == len(asked)


def test_greedy_gives_back_what_fits(judged):
    """Small units that went before a large one which alone would have been enough."""
    units, prices = units_of([10, 4, 10, 30, 10, 10])
    order = {1: 0.1, 3: 0.2}

    def judge(sizes):
        return sum(order.get(u.block, 1.0) for u in units if not sizes[u.name])

    found = Greedy().allocate(units, Evidence({}, judge=judge), prices, 0.65)
    assert list(found.values()) == [1, 1, 1, 0, 1, 1]


def test_greedy_takes_attention_as_one_and_any_method(opened, calibrated):
    data, model, allocator = calibrated("llama"), opened("llama"), Greedy()
    method = MoDeGPT()
    evidence = score(model, method, data.store, data.tokens, allocator)
    given = (model, method, evidence, data.record, data.tokens)
    asked = {"budget": Budget(keep=0.67), "allocator": allocator}
    told = []
    plan = make_plan(*given, **asked, store=data.store, advance=told.append)
    assert told == [1, 1, 1]  # attention and MLP of the block in the middle, then one of them
    assert {row.unit for row in plan.units if row.after < row.before} == {
        f"layers.1.{kind}" for kind in WIDTHS
    }
    assert {row.after for row in plan.units if row.unit.startswith("layers.1.")} == {0}
    with pytest.raises(InputError, match="no judge"):
        make_plan(*given, **asked)
