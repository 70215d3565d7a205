"""Prices in time, with a clock that reads shapes; nothing here asserts how long anything takes."""

import json
import random

import numpy as np
import pytest
import torch

from secateur.allocate.base import Evidence
from secateur.allocate.knapsack import Knapsack
from secateur.allocate.uniform import Uniform
from secateur.methods.flap import FLAP
from secateur.models.linear_ops import inputs_by_outputs
from secateur.scoring import latency
from secateur.scoring.latency import measured
from secateur.scoring.prices import prices_of
from secateur.structure.budget import Budget
from secateur.structure.error_curve import Curve
from secateur.utils.errors import InputError
from tests.support.families import FAMILIES

BUDGET = Budget(target="latency", multiple_of=1, batch=2, length=24)
FORWARD = 90_000  # nanoseconds of a whole pass, where nothing else is said


@pytest.fixture(autouse=True)
def cache_folder(monkeypatch, tmp_path):
    """Where this test's cache is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "secateur" / "latency"


@pytest.fixture(scope="module")
def llama(opened):
    return opened("llama")


def widths(block):
    """MLP, query/key and value width and KV heads of a block as it stands."""
    attention = block.attention.module
    own = attention.query_key, attention.value, attention.kv_heads
    return inputs_by_outputs(block.mlp.consumer).shape[0], *own


def timed(model, budget=BUDGET):
    """Prices of all widths."""
    return measured(model, model.units(budget.multiple_of), budget)


@pytest.fixture
def clock(monkeypatch):
    """Replaces the clock: nanoseconds of the first block by its widths, and of a whole pass.

    What is timed does run, so that the block is seen to work at that size. Gives the widths that
    were timed, and None for a whole pass.
    """
    hooks = []
    monkeypatch.setattr(latency, "ROUNDS", 2)

    def start(model, of_block, forward=FORWARD):
        seen, whole = [], []
        hooks.append(model.module.register_forward_hook(lambda *_: whole.append(True)))

        def clocked(run, device):
            whole.clear()
            output = run()
            if whole:
                seen.append(None)
                assert widths(model.blocks[0]) == widths(model.blocks[1])
                return forward * 1e-9
            assert output.shape == (BUDGET.batch, BUDGET.length, model.config.hidden_size)
            assert output.isfinite().all()
            seen.append(widths(model.blocks[0]))
            return of_block(*seen[-1]) * 1e-9

        monkeypatch.setattr(latency, "_timed", clocked)
        return seen

    yield start
    for hook in hooks:
        hook.remove()


def never(*_):
    pytest.fail("this was timed before")


def linear(mlp, query_key, value, heads):
    return 700 + 40 * mlp + 90 * query_key + 110 * value + 130 * heads


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "gpt_neox", "opt", "qwen3"])
def test_times_that_add_up_give_their_parts(opened, clock, name):
    model = opened(name)
    seen = clock(model, linear)
    prices = timed(model)
    rate = {"mlp": 40, "query_key": 90, "value_output": 110}
    units = model.units(1)
    assert set(prices.table) == {unit.name for unit in units}
    for unit in units:
        assert list(prices.table[unit.name]) == unit.sizes()
        for size in unit.sizes():
            assert abs(prices.of(unit, size) - rate[unit.kind] * (size - unit.least)) <= 1
    whole = sum(rate[unit.kind] * (unit.size - unit.least) for unit in units)
    assert prices.fixed == FORWARD - whole
    assert prices.whole(units) == FORWARD
    assert prices.target == "latency"
    full = [unit for unit in units if unit.block == 0]
    assert None in seen
    for unit in full:  # every kind is timed at its smallest and at full size
        place = ["mlp", "query_key", "value_output"].index(unit.kind)
        assert {unit.least, unit.size} <= {sizes[place] for sizes in seen if sizes}


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_whole_heads_are_timed_with_their_full_width(opened, clock, name):
    """Of the same table as widths are, for whatever units are asked about."""
    model = opened(name)
    seen = clock(model, linear)
    units = FLAP().units(model, BUDGET.multiple_of)
    prices = measured(model, units, BUDGET)
    assert set(prices.table) == {unit.name for unit in units}
    full = widths(model.blocks[0])
    gone = linear(full[0], 0, 0, full[3])  # what is left of it has no width
    for unit in units:
        expected = [40 * size for size in unit.sizes()]
        if unit.kind == "heads":
            expected = [max(0, linear(*full[:3], size) - gone) for size in unit.sizes()]
            expected[0] = 0
        assert list(prices.table[unit.name].values()) == pytest.approx(expected, abs=1)
    assert prices.whole(units) == FORWARD
    assert {(*full[:3], size) for size in range(1, full[3])} <= set(seen)
    assert timed(model).table["layers.0.mlp"] == prices.table["layers.0.mlp"]


def padded(mlp, query_key, value, heads=0):
    """A fused kernel pads queries, keys and values to one width."""
    return 700 + 40 * mlp + 300 * max(query_key, value) + 7 * query_key * value


def test_an_attention_costs_what_its_two_widths_cost_together(llama, clock):
    """The mistake: values timed beside full queries and keys, whose padding hides them; or the
    other way round, and what both share is counted twice or never."""
    seen = clock(llama, padded)
    prices = timed(llama)
    units = [unit for unit in llama.units(1) if unit.block == 0]
    _, query_key, value = units
    for size in query_key.sizes():  # beside full values
        expected = padded(56, size, 8) - padded(56, 0, 8)
        assert prices.of(query_key, size) == expected
    for size in value.sizes():  # without queries and keys
        assert prices.of(value, size) == 300 * size
    together = prices.of(query_key, 8) + prices.of(value, 8)
    assert together == padded(56, 8, 8) - padded(56, 0, 0)
    assert {s[1] for s in seen if s and s[2] < 8} == {0}
    assert {s[0] for s in seen if s and s[1:] != (8, 8, 2)} == {56}


def test_between_the_timed_sizes_prices_are_linear(llama, clock):
    def curved(mlp, query_key, value, heads):
        return mlp**2 + 5 * query_key**2 + 3 * value**3

    clock(llama, curved)
    prices = timed(llama)
    mlp, query_key, value = (unit for unit in llama.units(1) if unit.block == 2)
    points = list(range(0, 57, 7))
    for size in mlp.sizes():
        expected = np.interp(size, points, [k**2 for k in points])
        assert prices.of(mlp, size) == int(expected + 1e-6)
    assert prices.of(mlp, 7) == 49
    assert prices.of(mlp, 10) == 49 + 3 * (14**2 - 49) // 7 != 100
    assert prices.table[query_key.name] == {size: 5 * size**2 for size in range(0, 9, 2)}
    assert prices.table[value.name] == {size: 3 * size**3 for size in range(9)}


def test_multiples_read_the_same_table(llama, clock, monkeypatch):
    clock(llama, linear)
    fine = timed(llama)
    monkeypatch.setattr(latency, "_timed", never)
    coarse = timed(llama, Budget(target="latency", multiple_of=24, batch=2, length=24))
    units = llama.units(24)
    assert list(coarse.table["layers.1.mlp"]) == [0, 24, 48, 56]
    for unit in units:
        assert coarse.table[unit.name] == {k: fine.of(unit, k) for k in unit.sizes()}
    assert coarse.fixed == fine.fixed


@pytest.mark.parametrize("seed", range(5))
def test_noise_never_makes_a_larger_size_cheaper(llama, clock, seed):
    rng = random.Random(seed)
    clock(llama, lambda *sizes: linear(*sizes) + rng.randint(0, 3000), 1000)
    prices = timed(llama)
    for unit in llama.units(1):
        found = [prices.of(unit, size) for size in unit.sizes()]
        assert found[0] == 0
        assert found == sorted(found)
    # A whole pass that seems faster than its parts: they are scaled to it.
    units = llama.units(1)
    assert 1000 - len(units) <= prices.whole(units) - prices.fixed <= prices.whole(units) == 1000


def test_the_fastest_of_several_rounds_counts(llama, clock, monkeypatch):
    """The mistake: a mean, or the last of them, which a slow moment spoils."""
    rng = random.Random(0)

    def hiccups(*sizes):
        return linear(*sizes) + (0 if seen.count(None) == 2 else rng.randint(10**4, 10**6))

    seen = clock(llama, hiccups)
    monkeypatch.setattr(latency, "ROUNDS", 4)
    prices = timed(llama)
    assert seen.count(None) == 4
    for unit, rate in zip(llama.blocks[0].units(1), (40, 90, 110), strict=True):
        assert prices.of(unit, unit.size) == rate * unit.size


@pytest.mark.parametrize("name", FAMILIES)
def test_the_model_is_as_it_was(opened, monkeypatch, name):
    """And may be trained on or refined: tensors made in inference mode could not."""
    model = opened(name)
    attentions = [block.attention.module for block in model.blocks]
    before = {name: t.clone() for name, t in model.module.state_dict().items()}
    monkeypatch.setattr(latency, "ROUNDS", 1)
    monkeypatch.setattr(latency, "_timed", lambda run, device: float(run() is None))
    timed(model)
    after = model.module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [block.attention.module for block in model.blocks] == attentions
    tensors = [*model.module.parameters(), *model.module.buffers()]
    assert not any(tensor.is_inference() or tensor.requires_grad for tensor in tensors)


def test_the_second_time_nothing_is_timed(llama, opened, clock, monkeypatch, cache_folder):
    clock(llama, linear)
    first = timed(llama)
    (file,) = cache_folder.iterdir()
    kept = file.read_bytes()
    monkeypatch.setattr(latency, "_timed", never)
    assert timed(llama) == first
    assert timed(opened("llama")) == first
    assert prices_of(llama, llama.units(1), BUDGET) == first
    assert measured(llama, FLAP().units(llama, 1), BUDGET).whole(FLAP().units(llama, 1)) == FORWARD
    assert file.read_bytes() == kept
    assert "torch" in json.loads(kept)["of"]


@pytest.mark.parametrize(
    ("budget", "name", "dtype"),
    [
        (Budget(target="latency", batch=3, length=24), "llama", "float32"),
        (Budget(target="latency", batch=2, length=1), "llama", "float32"),
        (BUDGET, "llama_wide_heads", "float32"),
        (BUDGET, "opt", "float32"),
        (BUDGET, "llama", "float64"),
    ],
    ids=["batch", "length", "shape", "family", "number format"],
)
def test_anything_else_is_timed_anew(llama, opened, monkeypatch, budget, name, dtype):
    calls = []

    def counting(run, device):
        calls.append(run())
        return 1e-6 * len(calls)

    monkeypatch.setattr(latency, "ROUNDS", 1)
    monkeypatch.setattr(latency, "_timed", counting)
    timed(llama)
    once = len(calls)
    assert once
    timed(llama)
    assert len(calls) == once
    timed(opened(name, dtype), budget)
    assert len(calls) > once
    if budget is not BUDGET:  # the pass that is timed is the one that was asked for
        assert calls[once].shape[:2] == (budget.batch, budget.length)


def test_a_budget_below_what_is_fixed_says_what_is_within_reach(llama, clock):
    clock(llama, linear, 40_000)
    prices, units = timed(llama), llama.units(1)
    flat = {u.name: Curve((1.0,) * u.size + (0.0,)) for u in units}
    evidence = Evidence(flat, ((0.1,), (0.2,), (0.3,)), flat)
    for allocator in (Knapsack(), Uniform()):
        smallest = {unit.name: allocator.choices(unit)[0] for unit in units}
        least = prices.spent(units, smallest)
        assert least >= prices.fixed > 0
        with pytest.raises(InputError, match="nanoseconds of a forward pass") as caught:
            allocator.allocate(units, evidence, prices, 0.5)
        message = str(caught.value)
        assert f"({least:,} of 40,000)" in message
        named = float(message.split("between ")[1].split()[0])
        assert least / 40_000 <= named <= least / 40_000 + 0.001
        sizes = allocator.allocate(units, evidence, prices, named)
        assert least <= prices.spent(units, sizes) <= named * 40_000
        with pytest.raises(InputError):
            allocator.check(units, prices, named - 0.0011)
    full = {unit.name: unit.size for unit in units}
    assert Knapsack().allocate(units, evidence, prices, 1.0) == full


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:100],
        lambda text: json.dumps(json.loads(text) | {"nanoseconds": {}}),
        lambda text: json.dumps(json.loads(text) | {"nanoseconds": {"mlp": {"1": -5}}}),
        lambda text: json.dumps(json.loads(text) | {"forward": None}),
        lambda text: "[]",
    ],
    ids=["cut short", "no kinds", "negative", "no whole", "of another form"],
)
def test_a_damaged_cache_is_measured_again(llama, clock, cache_folder, damage):
    clock(llama, linear)
    first = timed(llama)
    (file,) = cache_folder.iterdir()
    file.write_text(damage(file.read_text()))
    assert timed(llama) == first


def test_more_tokens_than_positions_are_refused(opened, clock):
    model = opened("gpt2")
    clock(model, linear)
    with pytest.raises(InputError, match="64"):
        timed(model, Budget(target="latency", length=65))


def test_a_real_clock_gives_prices_that_never_fall(llama, monkeypatch):
    """However busy the machine is."""
    monkeypatch.setattr(latency, "SECONDS", 0.0005)
    budget = Budget(target="latency", multiple_of=8, batch=16, length=64)
    prices, units = timed(llama, budget), llama.units(8)
    for unit in units:
        found = [prices.of(unit, size) for size in unit.sizes()]
        assert found == sorted(found)
        assert found[0] == 0
    assert prices.fixed >= 0
    assert prices.whole(units) > 0
