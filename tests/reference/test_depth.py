"""Whole blocks: what they cost, which go first, and checkpoints without them."""

import json
from dataclasses import dataclass, replace
from itertools import combinations
from typing import ClassVar

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from secateur import (
    Goal,
    InputError,
    MoDeGPT,
    Settings,
    Store,
    calibrate,
    make_plan,
    open_model,
    pipeline,
)
from secateur import depth as depths
from secateur.allocate.base import Evidence
from secateur.allocate.greedy import Greedy
from secateur.allocate.knapsack import Knapsack
from secateur.allocate.least_error import LeastError
from secateur.apply import narrowed
from secateur.checkpoint import Writer, store_block, store_rest, write_config
from secateur.curve import Curve
from secateur.latency import measured
from secateur.methods.replace import Replace
from secateur.methods.shortgpt import ShortGPT
from secateur.methods.sleb import SLEB
from secateur.plan import match_units, prices_of, revise, tier_of
from secateur.prepare import Prepared, check_reach, chosen_allocator
from secateur.prices import Prices, counted
from secateur.progress import Progress
from secateur.propagate import narrow_blocks
from secateur.scores import score
from secateur.statistics import Change, Influence, Needs
from secateur.stitch import Stitched
from secateur.stopwatch import Stopwatch
from secateur.stream import Stream
from secateur.text import Calibration, Tokens
from secateur.units import DEPTH, WIDTHS, WholeBlock
from tests import families
from tests.contract.conftest import logits, spread
from tests.families import FAMILIES, stream

IDS = stream(24, seed=3).unsqueeze(0)
#: those of which each has something that others have not
QUICK = ("llama", "qwen2", "gemma2", "opt_norm_after", "gpt2_scaled", "gpt_neox", "falcon")
every_family = pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES]
)


def padded(count=6, length=32):
    """Windows of which some end early."""
    ids, mask = stream(count * length, seed=7).view(count, length), torch.ones(count, length).bool()
    mask[0, 20:] = mask[3, 9:] = False
    return Tokens(torch.where(mask, ids, 0), mask)


def measure(model, method, tokens=None):
    tokens, store = tokens or padded(), Store()
    calibrate(model, tokens, method.needs, store)
    return tokens, store


def gone(model, *indices):
    """Sizes of all blocks."""
    return {f"layers.{i}.block": int(i not in indices) for i in range(len(model.blocks))}


def write(model, method, sizes, folder):
    """A checkpoint of these sizes, as the pipeline writes one."""
    tokens, store = measure(model, method)
    evidence = score(model, method, store, tokens, LeastError())
    record = Calibration("stream", 6, 32, 0)
    dense = replace(method, keep=1.0)
    plan = make_plan(model, dense, evidence, record, tokens, Goal(), LeastError(), store=store)
    rows = tuple(row.model_copy(update={"after": sizes[row.unit]}) for row in plan.units)
    plan = revise(plan.model_copy(update={"units": rows}), model, method, evidence)
    prepared = Prepared(model, tokens, store, method, plan)
    memory, ids = pipeline.write(prepared, folder, Stopwatch(), Progress())
    return plan, memory, ids


def bypassed(model, constants):
    """The dense model's logits while blocks hand on what they get, and a constant."""
    handles = []
    for index, constant in constants.items():

        def instead(_, args, kwargs, output, constant=constant):
            states = (args[0] if args else kwargs["hidden_states"]) + constant
            return (states, *output[1:]) if isinstance(output, tuple) else states

        module = model.blocks[index].module
        handles.append(module.register_forward_hook(instead, with_kwargs=True))
    found = logits(model.module, IDS)
    for handle in handles:
        handle.remove()
    return found


def changes(model, tokens):
    """Input and output of every block over the real tokens, (tokens, hidden)."""
    walking, found = Stream(model, tokens), []
    for block in model.blocks:
        before = walking.states.clone()
        walking.advance(block)
        found.append((before[tokens.mask].double(), walking.states[tokens.mask].double()))
    return found


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
    for linear in (block.consumer, block.attention.o_proj):
        linear.weight.zero_()
        if linear.bias is not None:
            linear.bias.zero_()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("method", [ShortGPT, SLEB, Replace])
def test_an_idle_block_goes_first_and_is_free(opened, tmp_path, name, method):
    model, made = opened(name), method(keep=0.7)
    idle(model.blocks[1])
    dense = logits(model.module, IDS)
    tokens, store = measure(model, made)
    evidence = score(model, made, store, tokens)
    assert evidence.curves["layers.1.block"].at(0) == pytest.approx(0, abs=1e-12)
    others = [u for u in made.units(model, 1) if u.block != 1 and not u.fixed]
    assert min(evidence.curves[unit.name].at(0) for unit in others) > 1e-3
    record = Calibration("stream", 6, 32, 0)
    plan = make_plan(model, made, evidence, record, tokens, Goal(), store=store)
    assert plan.sizes == gone(model, 1)
    prepared = Prepared(model, tokens, store, made, plan)
    pipeline.write(prepared, tmp_path / "small", Stopwatch(), Progress())
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32).eval()
    assert spread(logits(small, IDS), dense) < 1e-5


def units_of(prices):
    """Blocks, and their prices."""
    units = [
        WholeBlock(f"layers.{i}.block", block=i, size=1, step=1, hidden=8, parts=())
        for i in range(len(prices))
    ]
    table = {unit.name: {0: 0, 1: price} for unit, price in zip(units, prices, strict=True)}
    return units, Prices("parameters", table)


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


# The search


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
        return Stitched(model, made, units, {u.name: [0, 1] for u in units}, store, tokens)

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
    method = MoDeGPT(keep=0.67)
    evidence = score(model, method, data.store, data.tokens, allocator)
    given = (model, method, evidence, data.record, data.tokens, Goal(), allocator)
    plan = make_plan(*given, store=data.store)
    assert {row.unit for row in plan.units if row.after < row.before} == {
        f"layers.1.{kind}" for kind in WIDTHS
    }
    assert {row.after for row in plan.units if row.unit.startswith("layers.1.")} == {0}
    with pytest.raises(InputError, match="no judge"):
        make_plan(*given)


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
    goal = Goal(target=target, length=16)
    prices = prices_of(model, units, goal) if target != "latency" else measured(model, units, goal)
    assert all(prices.of(unit, 0) == 0 < prices.of(unit, 1) for unit in units)
    evidence = Evidence({unit.name: Curve((0.1 + unit.block, 0.0)) for unit in units})
    keep = (prices.fixed + 2.01 * prices.of(units[0], 1)) / prices.whole(units)
    assert LeastError().allocate(units, evidence, prices, min(keep, 1)) == gone(model, 0)


# Replacement by a constant


def test_the_constant_is_the_best_one_and_the_error_is_what_it_leaves(opened):
    model, method, tokens = opened("llama", "float64"), Replace(), padded()
    _, store = measure(model, method, tokens)
    for block, (x, y) in zip(model.blocks, changes(model, tokens), strict=True):
        (unit,) = block.units(1, DEPTH, True)
        solution = method.solve(unit, block, store.get(block.index, method.needs))
        bias = solution.at(0).bias
        assert bias is not None

        def left(constant, x=x, y=y):
            return float((y - x - constant).square().sum() / y.square().sum())

        assert solution.curve.at(0) == pytest.approx(left(bias), rel=1e-9)
        assert solution.curve.at(1) == 0
        if block.index:
            for seed in range(4):
                torch.manual_seed(seed)
                assert left(bias) < left(bias + 1e-3 * torch.randn_like(bias))


@every_family
@pytest.mark.parametrize("indices", [(1, 2), (2,)])
def test_a_folded_constant_is_one_added_to_the_stream(opened, name, indices):
    """Behind a block that stays; blocks without one before them leave nothing."""
    model, method, tokens = opened(name, "float64"), Replace(), padded()
    _, store = measure(model, method, tokens)
    sizes, constants = gone(model, *indices), {}
    for block in model.blocks:
        solution = method.solve(
            block.units(1, DEPTH, True)[0], block, store.get(block.index, method.needs)
        )
        if block.index in indices:
            bias = solution.at(0).bias
            # where norms stand behind sums a bias of the MLP does not reach the stream
            assert (bias is not None) == (block.index > 0 and block.sums)
            constants[block.index] = 0.0 if bias is None or 0 in indices else bias
    expected = bypassed(model, constants)
    units = method.units(model, 8)
    for _ in narrow_blocks(model, method, units, sizes, tokens, store):
        pass
    assert spread(logits(model.module, IDS), expected) < 1e-9
    if any(isinstance(value, torch.Tensor) for value in constants.values()):
        plain = bypassed(opened(name, "float64"), dict.fromkeys(indices, 0.0))
        assert spread(plain, expected) > 1e-3


def test_a_measured_loss_counts_the_constant(opened):
    model, method, tokens = opened("llama", "float64"), Replace(), padded()
    _, store = measure(model, method, tokens)
    block = model.blocks[1]
    (unit,) = block.units(1, DEPTH, True)
    narrowing = method.solve(unit, block, store.get(1, method.needs)).at(0)
    expected, before = bypassed(model, {1: narrowing.bias}), logits(model.module, IDS)
    with narrowed(block, unit, narrowing):
        assert block.gone
        assert spread(logits(model.module, IDS), expected) < 1e-12
    assert not block.gone
    assert torch.equal(logits(model.module, IDS), before)


# Checkpoints


def saved(folder):
    return json.loads((folder / "config.json").read_text())


def generated(model, cached):
    with torch.inference_mode():
        return model.generate(
            IDS,
            attention_mask=torch.ones_like(IDS),
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            use_cache=cached,
            pad_token_id=0,
        )


@every_family
def test_stock_classes_load_what_is_left(opened, tmp_path, name):
    """The mistakes: KV caches by the old numbers, kinds of layers by the old places."""
    model = opened(name)
    expected, stored = bypassed(model, {0: 0.0}), model.stored
    plan, *_ = write(model, ShortGPT(), gone(model, 0), tmp_path / "small")
    assert plan.tier == "plain"
    assert not (tmp_path / "small" / "modeling_secateur.py").exists()
    config, dense = saved(tmp_path / "small"), FAMILIES[name].options
    assert config.get("num_hidden_layers", config.get("n_layer")) == 2
    if "layer_types" in dense:
        assert config["layer_types"] == dense["layer_types"][1:]
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=stored).eval()
    assert type(small).__module__.startswith("transformers.models.")
    if "gemma2" in name:
        small.set_attn_implementation("eager")
    assert spread(logits(small, IDS), expected) < 2e-5
    assert torch.equal(generated(small, True), generated(small, False))
    again = open_model(tmp_path / "small", Settings(device="cpu"))
    assert [block.index for block in again.blocks] == [0, 1]


def last(model):
    """Logits of the last token, with the others in a cache and without one."""
    with torch.inference_mode():
        cache = model(input_ids=IDS[:, :-1], use_cache=True).past_key_values
        step = model(input_ids=IDS[:, -1:], past_key_values=cache).logits[0, -1]
        return step, logits(model, IDS)[0, -1]


def test_the_model_in_memory_follows(opened, tmp_path):
    """And the mistake put back: by old numbers a cache has a layer too few."""
    model = opened("llama")
    expected = bypassed(model, {0: 0.0})
    write(model, ShortGPT(), gone(model, 0), tmp_path / "small")
    assert [block.index for block in model.blocks] == [0, 1]
    assert model.config.num_hidden_layers == 2
    numbered = [m for m in model.module.modules() if hasattr(m, "layer_idx")]
    assert [module.layer_idx for module in numbered] == [0, 1]
    model.module.float()
    assert spread(logits(model.module, IDS), expected) < 0.2  # left in bfloat16
    assert spread(*last(model.module)) < 1e-5
    for module in numbered:
        module.layer_idx += 1
    with pytest.raises(IndexError):
        last(model.module)


def test_bytes_on_disk_are_those_of_the_blocks_left(dense, opened, tmp_path):
    before = load_file(dense("llama") / "model.safetensors")
    model = opened("llama")
    plan, *_ = write(model, Replace(), gone(model, 1), tmp_path / "small")
    after = load_file(tmp_path / "small" / "model.safetensors")
    assert plan.tier == "per-layer"
    new = set(after) - set(before)
    assert new == {"model.layers.0.mlp.down_proj.bias"}
    lost = sum(t.nbytes for key, t in before.items() if ".layers.1." in key)
    sizes = [sum(t.nbytes for t in tensors.values()) for tensors in (before, after)]
    assert sizes[0] - sizes[1] == lost - 4 * families.HIDDEN
    for key, tensor in after.items():
        if key not in new:
            old = key.replace(".layers.1.", ".layers.2.")
            assert torch.equal(tensor, before[old]), key
    units = {unit.name: unit for unit in Replace().units(opened("llama"), 8)}
    counted_as = units["layers.1.block"].cost(1, 4).bytes
    assert 0 < lost - counted_as < 0.05 * lost  # norms, which no unit counts
    assert lost - counted_as > 4 * families.HIDDEN  # and which outweigh the new bias


def test_per_layer_checkpoints_may_lack_blocks_too(opened, tmp_path):
    """A block gone, another with a bias of its own, a third narrower."""

    @dataclass(frozen=True)
    class Both(MoDeGPT):
        kinds: ClassVar = (*WIDTHS, *DEPTH)
        needs: ClassVar = MoDeGPT.needs | Replace.needs
        biased: ClassVar = True

        def solve(self, unit, block, statistics):
            if unit.kind == "block":
                return Replace().solve(unit, block, statistics)
            return super().solve(unit, block, statistics)

    model, method = opened("llama"), Both()
    tokens, store = measure(model, method)
    units = method.units(model, 8)
    sizes = {unit.name: unit.size for unit in units} | {
        "layers.1.block": 0,
        "layers.2.mlp": 24,
        "layers.2.value_output": 3,
    }
    assert tier_of(units, sizes) == "per-layer"
    writer = Writer(tmp_path)
    for block in narrow_blocks(model, method, units, sizes, tokens, store):
        store_block(model, block, writer)
    expected = logits(model.module, IDS)
    store_rest(model, writer)
    writer.finish()
    depths.close_ranks(model)
    write_config(model, "per-layer", tmp_path)
    layers = saved(tmp_path)["secateur"]["layers"]
    assert [sorted(layer) for layer in layers] == [["linears"], ["attention", "linears"]]
    assert list(layers[0]["linears"]) == ["mlp.down_proj"]
    small = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert spread(logits(small, IDS), expected) < 2e-5
    assert torch.equal(generated(small, True), generated(small, False))


# Plans and tiers


def test_plans_keep_a_block_and_tiers_follow_from_biases(opened):
    for name, method, tier in (
        ("llama", ShortGPT(), "plain"),
        ("llama", Replace(), "per-layer"),
        ("llama", Replace(compensate=0), "plain"),
        ("gpt2", Replace(), "plain"),  # its MLPs have biases
    ):
        model = opened(name)
        units = method.units(model, 8)
        assert tier_of(units, gone(model, 1)) == tier
        assert tier_of(units, gone(model)) == "plain"
    goal, made = Goal(tier="plain"), ShortGPT(keep=0.7)
    allocator = chosen_allocator(made, goal, None)
    assert isinstance(allocator, LeastError)
    check_reach(opened("llama"), made, goal, allocator)
    with pytest.raises(InputError, match="--compensate 0"):
        check_reach(opened("llama"), Replace(), goal, allocator)
    model = opened("llama")
    tokens, store = measure(model, made)
    evidence = score(model, made, store, tokens)
    plan = make_plan(model, made, evidence, Calibration("s", 6, 32, 0), tokens)
    rows = tuple(row.model_copy(update={"after": 0}) for row in plan.units)
    with pytest.raises(InputError, match="no block is left"):
        match_units(plan.model_copy(update={"units": rows}), model, made)


def test_a_bypass_outlives_a_look_at_the_head(opened):
    """The mistake: taking the logits of a stream puts a block back that is gone."""
    model, tokens = opened("llama"), padded()
    walking = Stream(model, tokens)
    model.blocks[1].remove()
    before = logits(model.module, IDS)
    walking.logits(walking.batches[0], walking.at(walking.batches[0]))
    assert torch.equal(logits(model.module, IDS), before)
    model.blocks[1].put_back()
    assert spread(logits(model.module, IDS), before) > 1e-3
