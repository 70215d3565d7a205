"""Gradients of channels and KV heads, and what is made of them: finite differences, brute force."""

from dataclasses import replace
from functools import partial
from itertools import pairwise, product

import pytest
import torch
from torch import nn

from secateur import InputError, Store, calibrate
from secateur.allocate.base import Evidence
from secateur.allocate.greedy import Greedy
from secateur.allocate.middle import Middle
from secateur.allocate.nirvana import TwoThresholds
from secateur.calibration import gradients as module
from secateur.calibration.gradients import CURVED_LOSS, LOGITS, LOSS, collect_gradients
from secateur.calibration.needs import Needs
from secateur.data.tokens import Tokens, sample
from secateur.methods.llm_pruner import FORMS, LLMPruner
from secateur.methods.nirvana import Nirvana
from secateur.structure.costs import counted
from tests.support.blocks import axis
from tests.support.families import stream
from tests.support.made import heads, mlp

KINDS = ("mlp", "heads")
FAMILIES = ("llama_biased_tied", "gpt2", "phi3", "opt")  # grouped heads, Conv1D, fused, biases


def windows(rows=3, length=12, seed=0):
    return sample(stream(rows * length, seed), rows, length, seed)


def padded():
    """Two whole windows, one of five tokens, one of a single one; and what is real in them."""
    tokens = windows(4)
    lengths = torch.tensor([12, 12, 5, 1])
    return Tokens(tokens.ids.clone(), torch.arange(12) < lengths.unsqueeze(1))


def exact(model):
    """The model with norms that don't pass through float32, so that small steps show."""

    def normed(norm, states):
        mean = states.square().mean(-1, keepdim=True)
        return norm.weight * states * torch.rsqrt(mean + norm.variance_epsilon)

    for norm in model.module.modules():
        if hasattr(norm, "variance_epsilon"):
            norm.forward = partial(normed, norm)
    return model


def loss(model, tokens):
    logits = model.module(input_ids=tokens.ids, use_cache=False).logits[:, :-1]
    real = tokens.mask[:, 1:]
    return nn.functional.cross_entropy(logits[real], tokens.ids[:, 1:][real])


def highest(model, tokens):
    logits = model.module(input_ids=tokens.ids, use_cache=False).logits
    rows = [row[real].max(0).values for row, real in zip(logits, tokens.mask, strict=True)]
    return torch.stack(rows).mean()


def means(model, tokens, needs):
    found = collect_gradients(model, tokens, frozenset(needs.values()))
    return [{kind: found[b.index][needs[kind]].mean for kind in KINDS} for b in model.blocks]


def scale(block, kind, index, factor):
    """Scale all parameters of a channel, or of a KV head and the query heads that read it."""
    if kind == "mlp":
        for part in axis(block, kind).parameters():
            part[index].mul_(factor)
        return
    attention = block.attention.module
    group, width = attention.num_key_value_groups, attention.query_key
    for linear, rows in (
        (attention.q_proj, slice(index * group * width, (index + 1) * group * width)),
        (attention.k_proj, slice(index * width, (index + 1) * width)),
        (attention.v_proj, slice(index * attention.value, (index + 1) * attention.value)),
    ):
        linear.weight[rows].mul_(factor)
        if linear.bias is not None:
            linear.bias[rows].mul_(factor)
    columns = group * attention.value
    attention.o_proj.weight[:, index * columns : (index + 1) * columns].mul_(factor)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("needs", "functional"), [(LOSS, loss), (LOGITS, highest)])
def test_the_sum_over_a_group_is_what_scaling_it_down_does(opened, family, needs, functional):
    """The mistake: query heads summed with a KV head that they don't read (llm-pruner)."""
    model, tokens, step = exact(opened(family, "float64")), padded(), 1e-5
    found = means(model, tokens, needs)
    for block, kind in product((model.blocks[0], model.blocks[2]), KINDS):
        for index in (0, 1):
            sides = []
            for factor in (1 - step, (1 + step) / (1 - step)):
                scale(block, kind, index, factor)
                sides.append(float(functional(model, tokens)))
            scale(block, kind, index, 1 / (1 + step))
            slope = (sides[1] - sides[0]) / (2 * step)
            assert float(found[block.index][kind][1, index]) == pytest.approx(slope, abs=1e-7)


def test_parts_are_those_of_plain_autograd(opened):
    """Σ |g∘w| by hand, from weights as transformers has them; squares window by window."""
    model, tokens = exact(opened("llama", "float64")), windows()
    found, down = means(model, tokens, CURVED_LOSS), model.blocks[1].mlp.consumer
    mlp = [module for module, _ in model.blocks[1].mlp.producers] + [down]
    weights = [m.weight for m in mlp]

    def gradients(part):
        for weight in weights:
            weight.requires_grad_(True)
        return torch.autograd.grad(loss(model, part), weights)

    def by_channel(values):
        gate, up, out = values
        return torch.cat((gate, up, out.t()), 1)[7]

    rows = [Tokens(tokens.ids[i : i + 1], tokens.mask[i : i + 1]) for i in range(3)]
    with torch.enable_grad():
        g = by_channel(gradients(tokens))
        squares = torch.stack([by_channel(gradients(row)).square() for row in rows]).mean(0)
    w = by_channel([weight.detach() for weight in weights])
    second = 0.5 * w.square() * squares
    wanted = [(g * w).abs().sum(), (g * w).sum(), second.sum(), (g * w - second).abs().sum()]
    torch.testing.assert_close(found[1]["mlp"][:, 7], torch.stack(wanted), rtol=1e-9, atol=0)


@pytest.mark.parametrize("needs", [LOSS, CURVED_LOSS, LOGITS])
def test_what_padding_holds_never_counts(opened, needs):
    """The mistake: the highest logit over a window's padding, too (nirvana)."""
    model, tokens = opened("llama", "float64"), padded()
    other = tokens.ids.masked_fill(~tokens.mask, 7)
    assert not torch.equal(other, tokens.ids)
    for one, two in zip(
        means(model, tokens, needs), means(model, Tokens(other, tokens.mask), needs), strict=True
    ):
        for kind in KINDS:
            torch.testing.assert_close(one[kind], two[kind], rtol=1e-12, atol=0)


@pytest.mark.parametrize("needs", [LOSS, LOGITS])
def test_batches_make_no_difference(opened, monkeypatch, needs):
    model, tokens = opened("llama", "float64"), windows(5)
    whole = means(model, tokens, needs)
    monkeypatch.setattr(module, "TOKENS_PER_BACKWARD", 24)
    for one, two in zip(whole, means(model, tokens, needs), strict=True):
        for kind in KINDS:
            torch.testing.assert_close(one[kind], two[kind], rtol=1e-9, atol=1e-15)


def test_first_order_is_the_same_beside_second(opened):
    model, tokens = opened("gpt2", "float64"), windows()
    for one, two in zip(means(model, tokens, LOSS), means(model, tokens, CURVED_LOSS), strict=True):
        for kind in KINDS:
            torch.testing.assert_close(one[kind], two[kind][:2], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("inference", [False, True])
def test_the_model_is_left_as_it_was(opened, inference):
    model, tokens = opened("llama_yarn"), windows()
    marked = model.blocks[1].mlp.consumer.weight
    marked.requires_grad_(True).grad = torch.ones_like(marked)
    with torch.inference_mode():
        before = model.module(input_ids=tokens.ids).logits
    with torch.inference_mode(inference):
        calibrate(model, tokens, frozenset({*LOSS.values(), *CURVED_LOSS.values()}), Store())
    with torch.inference_mode():
        assert torch.equal(model.module(input_ids=tokens.ids).logits, before)
    for parameter in model.module.parameters():
        assert parameter.requires_grad == (parameter is marked)
        assert (parameter.grad is not None) == (parameter is marked)
        assert not parameter._post_accumulate_grad_hooks
    assert bool((marked.grad == 1).all())


def test_stored_beside_the_others_and_read_back(opened, tmp_path):
    model, tokens, kept = opened("llama"), windows(), (Store(), Store(tmp_path / "s"))
    needs = frozenset({Needs.HIDDEN_GRAM, *LOGITS.values()})
    for store in kept:
        calibrate(model, tokens, needs, store)
    for block in model.blocks:
        one, two = (store.get(block.index, needs) for store in kept)
        assert set(one) == set(two) == needs
        for need in needs:
            assert torch.equal(one[need].mean, two[need].mean)


def test_gradients_that_overflow_are_refused(opened):
    model = opened("llama")
    model.module.lm_head.weight.mul_(1e38)
    with pytest.raises(InputError, match="gradients"):
        calibrate(model, windows(), frozenset(LOSS.values()), Store())


def test_text_without_a_following_token_is_refused(opened):
    tokens = windows()
    alone = Tokens(tokens.ids, torch.arange(12).expand(3, 12) < 1)
    with pytest.raises(InputError, match="more text"):
        collect_gradients(opened("llama"), alone, LOSS.values())


@pytest.mark.parametrize("form", FORMS)
def test_every_form_ranks_by_its_row(opened, form):
    model, tokens, method = opened("llama", "float64"), windows(), LLMPruner(taylor=form)
    block, store = model.blocks[1], Store()
    calibrate(model, tokens, method.needs, store)
    statistics = store.get(1, method.needs)
    for unit in method.units(model, 1)[2:4]:
        table = means(model, tokens, CURVED_LOSS)[1][unit.kind]
        wanted = table[FORMS[form]].abs().sort().indices
        solution = method.solve(unit, block, statistics)
        for size in range(unit.size):
            gone = set(range(unit.size)) - set(solution.at(size).keep.tolist())
            assert gone == set(wanted[: unit.size - size].tolist())


def test_an_unknown_form_is_refused():
    with pytest.raises(InputError, match="vector"):
        LLMPruner(taylor="vectr")


def test_squares_are_collected_only_where_they_are_asked_for():
    assert LLMPruner().needs == frozenset(LOSS.values())
    assert LLMPruner(taylor="mix").needs == frozenset(CURVED_LOSS.values())
    assert Nirvana().allocator.needs == Nirvana.needs


BLOCKS, WIDTH, KV = 6, 96, 4


def units(step=8):
    return [u for b in range(BLOCKS) for u in (mlp(b, WIDTH, step), heads(b, KV))]


def evidence(seed):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(BLOCKS, 1, generator=generator) + 0.2
    values = scale * torch.rand(BLOCKS, KV + WIDTH, generator=generator)
    return Evidence({}, [(float(KV), *row) for row in values.tolist()])


def cheapest(found, prices):
    return min(prices.of(u, b) - prices.of(u, a) for u in found for a, b in steps(u))


def steps(unit):
    allowed = unit.sizes()
    return list(pairwise(allowed[1:]))


@pytest.mark.parametrize("keep", [0.9, 0.77, 0.61, 0.43])
@pytest.mark.parametrize("gamma", [0.0, 1.0, 3.36])
def test_counts_solve_the_budget(keep, gamma):
    found, allocator = units(), TwoThresholds(gamma)
    prices = counted(found, "parameters", 4)
    shares = allocator.shares(found, evidence(0), prices, keep)
    spent = sum(shares[u.name] * prices.of(u, u.size) for u in found)
    assert spent == pytest.approx(keep * prices.whole(found), rel=1e-12)


@pytest.mark.parametrize("keep", [0.9, 0.77, 0.61])
def test_gamma_is_the_ratio_of_the_fractions(keep):
    found, prices = units(), counted(units(), "parameters", 4)
    for gamma in (1.0, 2.0):
        shares = TwoThresholds(gamma).shares(found, evidence(1), prices, keep)
        gone = {k: sum(1 - shares[u.name] for u in found if u.kind == k) for k in KINDS}
        assert gone["mlp"] == pytest.approx(gamma * gone["heads"], rel=1e-9)


def test_thresholds_are_global_and_no_block_is_emptied():
    found, prices = units(step=1), counted(units(step=1), "parameters", 4)
    given = evidence(2)
    shares = TwoThresholds(1.0).shares(found, given, prices, 0.5)
    values = torch.tensor(given.readings, dtype=torch.float64)[:, 1 + KV :]
    line = values.flatten().sort().values[int(0.5 * values.numel())]
    for block in range(BLOCKS):
        kept = max(1 / WIDTH, float((values[block] >= line).double().mean()))
        assert shares[f"{block}.mlp"] == pytest.approx(kept, abs=1e-9)
    faint = [list(row) for row in given.readings]
    faint[3] = [float(KV), *(1e-9 * x for x in faint[3][1:])]
    shares = TwoThresholds().shares(found, Evidence({}, faint), prices, 0.6)
    assert shares["3.mlp"] == pytest.approx(1 / WIDTH)
    assert shares["3.heads"] == pytest.approx(1 / KV)


@pytest.mark.parametrize("keep", [0.93, 0.8, 0.7, 0.6])
@pytest.mark.parametrize("allocator", [TwoThresholds(), Middle(), Middle(0.34, 0.17)])
def test_rounding_meets_the_budget(allocator, keep):
    """The mistakes: widths rounded up (nirvana), a ratio that leaves the ends out (llm-pruner)."""
    found, prices = units(), counted(units(), "parameters", 4)
    for seed in range(4):
        sizes = allocator.allocate(found, evidence(seed), prices, keep)
        left = prices.budget(found, keep) - prices.spent(found, sizes)
        assert 0 <= left < cheapest(found, prices)
        for unit in found:
            assert sizes[unit.name] in unit.sizes()


def test_the_ends_stay_whole_and_the_middle_shares_one_ratio():
    found, prices = units(), counted(units(), "parameters", 4)
    sizes = Middle(0.34, 0.17).allocate(found, Evidence({}), prices, 0.7)
    for unit in found:
        if unit.block in (0, 1, 5):
            assert sizes[unit.name] == unit.size
        else:
            assert abs(sizes[unit.name] / unit.size - 0.4) < 1.0 / unit.size * unit.step


def test_an_encoder_and_a_decoder_have_ends_of_their_own():
    """The mistake: the ends of all blocks, which are in the first and the last stack alone."""
    found = [replace(u, stack="decoder" if u.block > 2 else "encoder") for u in units()]
    ends = {unit.name for unit in found if unit.block in (0, 2, 3, 5)}
    assert Middle(0.34, 0.34).whole(found) == ends
    prices = counted(found, "parameters", 4)
    sizes = Greedy().allocate(found, Evidence({}, judge=lambda _: 0.0), prices, 0.7)
    assert {unit.name for unit in found if sizes[unit.name] == unit.size} >= ends
    with pytest.raises(InputError, match="out of reach"):
        Greedy().check(found, prices, 0.6)


def test_few_blocks_have_no_ends_and_too_many_are_refused():
    found, prices = units(), counted(units(), "parameters", 4)
    assert Middle().whole(found) == set()
    with pytest.raises(InputError, match="out of reach"):
        Middle(0.5, 0.5).allocate(found, Evidence({}), prices, 0.9)
