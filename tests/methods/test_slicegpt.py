"""SliceGPT against closed forms and a dense model whose stream is projected by hand."""

import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from secateur import Budget, Calibration, InputError, Knapsack, Store, calibrate, make_plan, score
from secateur.allocate.plain import PlainWidth
from secateur.allocate.uniform import Uniform
from secateur.apply.residual_slicing import Slicing, sliced_blocks
from secateur.calibration.needs import Needs
from secateur.calibration.statistics import Gram
from secateur.data.tokens import Tokens, sample
from secateur.families import FAMILIES as ANATOMIES
from secateur.families.pre_norm import PRE_NORMS
from secateur.methods import METHODS, check_served, method_class
from secateur.methods.base import Solution
from secateur.methods.modegpt import MoDeGPT
from secateur.methods.slicegpt import SliceGPT
from secateur.pipeline.compress_stage import write
from secateur.pipeline.context import RunContext
from secateur.pipeline.prepare import check_reach
from secateur.structure.costs import counted
from secateur.structure.narrowing import Narrowing
from secateur.structure.units import WHOLE_HEADS
from tests.support import families
from tests.support.steps import prepared_of, step_of

SERVED = [name for name in families.FAMILIES if name.startswith(("llama", "mistral", "qw", "phi"))]
IDS = torch.arange(3, 27).unsqueeze(0) * 7 % 88 + 3
HIDDEN = families.HIDDEN
EXACT = 1e-5  # stock norms and rotary tables are in float32, whatever the model


@pytest.fixture(scope="module")
def tokens():
    return sample(families.stream(6 * 32), 6, 32, 0)


def logits(model):
    with torch.no_grad():
        return model.module(input_ids=IDS, use_cache=False).logits


def cut(model, size, tokens, method=None):
    """The model with a stream of some size, today's included."""
    method = method or SliceGPT()
    (unit,) = method.units(model, 1)
    assert len(list(sliced_blocks(model, method, unit, size, tokens))) == len(model.blocks)
    return model


def spread(found, expected):
    return float((found - expected).abs().max() / expected.std())


@pytest.mark.parametrize("name", SERVED)
def test_turned_and_not_sliced_a_model_says_the_same(opened, tokens, name):
    model = opened(name, "float64")
    before = logits(model)
    cut(model, HIDDEN, tokens)
    shortcut = model.blocks[1].module.attention_shortcut
    assert spread(shortcut, torch.eye(HIDDEN)) > 0.1  # it has turned
    assert spread(logits(model), before) < EXACT


def test_embeddings_turn_about_the_origin(opened, tokens):
    """The mistake: their mean is subtracted, which only a LayerNorm would not notice."""
    model = opened("llama", "float64")
    embedding = model.module.get_input_embeddings()
    embedding.weight += 0.5
    dense, before = embedding.weight.clone(), logits(model)
    cut(model, HIDDEN, tokens)
    torch.testing.assert_close(embedding.weight @ embedding.weight.T, dense @ dense.T)
    assert spread(logits(model), before) < EXACT


@pytest.mark.parametrize("name", ["llama_biased_tied", "qwen3", "phi3"])
def test_coordinates_that_are_zero_go_for_nothing(opened, tokens, name):
    """And the norms still divide by all of them: ε is large enough to tell."""
    model, size = opened(name, "float64"), 20
    readers = [
        linear for b in model.blocks for linear in (b.attention.module.o_proj, b.mlp.consumer)
    ]
    norms = [m for m in model.module.modules() if hasattr(m, "variance_epsilon")]
    for norm in norms:
        norm.variance_epsilon = 0.1
    model.module.get_input_embeddings().weight[:, size:] = 0
    for linear in readers:
        linear.weight[size:] = 0
        if linear.bias is not None:
            linear.bias[size:] = 0
    before = logits(model)
    cut(model, size, tokens)
    assert spread(logits(model), before) < EXACT
    own = [norm for norm in norms if norm.weight.numel() == size]
    assert len(own) == 2 * len(model.blocks) + 1  # those inside heads stay
    assert all(bool((norm.weight == 1).all()) for norm in own)
    assert {norm.variance_epsilon for norm in own} == {0.1 * HIDDEN / size}
    assert {norm.variance_epsilon for norm in norms if norm not in own} <= {0.1}
    for norm in own:
        norm.variance_epsilon = 0.1
    assert spread(logits(model), before) > 1e-3


def projected(model, size, tokens):
    """Logits of the dense model with its stream projected at every place, and the energies lost.

    Every projection is on the first eigenvectors of what the ones before it leave.
    """
    module = model.module
    base, lost = module.model, []

    def reduced(states, ids):
        rows = ids.flatten(0, 1)
        values, vectors = torch.linalg.eigh(rows.T @ rows)
        lost.append(float(values[:-size].sum() / values.sum()))
        keep = vectors[:, -size:]
        return states @ keep @ keep.T, ids @ keep @ keep.T

    def attended(layer, read, ids):
        places = torch.arange(ids.shape[1]).unsqueeze(0)
        tables = base.rotary_emb(read, position_ids=places)
        return layer.self_attn(read, position_embeddings=tables, attention_mask=None)[0]

    x, seen = base.embed_tokens(IDS), base.embed_tokens(tokens.ids)
    x, seen = reduced(x, seen)
    module.set_attn_implementation("sdpa")  # causal without a mask
    for layer in base.layers:
        both = []
        for states, ids in ((x, IDS), (seen, tokens.ids)):
            read = layer.input_layernorm(states)
            both.append(states + attended(layer, read, ids))
        x, seen = reduced(*both)
        x, seen = (s + layer.mlp(layer.post_attention_layernorm(s)) for s in (x, seen))
        x, seen = reduced(x, seen)
    return module.lm_head(base.norm(x)), lost


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_sliced_model_is_the_dense_one_with_a_projected_stream(opened, tokens, name):
    """Each basis is that of what is sliced already: the dense model's would give other logits."""
    model = opened(name, "float64")
    with torch.no_grad():
        expected, lost = projected(model, 20, tokens)
    dense = logits(model)
    cut(model, 20, tokens)
    assert min(lost) > 1e-3
    assert spread(logits(model), expected) < EXACT
    assert spread(dense, expected) > 0.1


def test_the_orientation_changes_no_logit_and_evens_out_the_coordinates(opened, tokens):
    said, sizes = {}, {}
    for orientation in ("random", "pca"):
        model = cut(opened("llama", "float64"), 16, tokens, SliceGPT(orientation=orientation))
        said[orientation] = logits(model)
        energies = model.module.get_input_embeddings().weight.square().sum(0)
        sizes[orientation] = float(energies.max() / energies.min())
    assert spread(said["random"], said["pca"]) < EXACT
    assert sizes["random"] < 0.7 * sizes["pca"]
    with pytest.raises(InputError, match="Did you mean 'random'"):
        SliceGPT(orientation="ramdom")


def test_the_energy_that_stays_is_the_sum_of_the_first_eigenvalues(opened):
    rows = torch.randn(40, HIDDEN).double() * torch.linspace(2, 0.1, HIDDEN).double() + 0.3
    gram = Gram()
    gram.update(rows.unsqueeze(0), mask=torch.ones(1, 40, dtype=torch.bool))
    method, model = SliceGPT(), opened("llama")
    (unit,) = method.units(model, 1)
    solution = method.solve(unit, model.blocks[0], {Needs.BEHIND_GRAM: gram})
    energies = torch.linalg.svdvals(rows).square()  # not of an eigendecomposition
    for size in (1, 7, 24, HIDDEN):
        basis = solution.at(size).encode
        torch.testing.assert_close(basis.T @ basis, torch.eye(size).double())
        stays = float((rows @ basis).square().sum() / rows.square().sum())
        assert stays == pytest.approx(float(energies[:size].sum() / energies.sum()))
        assert solution.curve.at(size) == pytest.approx(1 - stays, abs=1e-12)


def test_the_curve_is_the_mean_over_all_places_of_the_dense_stream(opened, tokens):
    model, seen = opened("llama", "float64"), []
    for block in model.blocks:
        norm = block.module.post_attention_layernorm
        norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        block.module.register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        model.module(input_ids=tokens.ids)
    plain, store = opened("llama", "float64"), Store()
    calibrate(plain, tokens, SliceGPT.needs, store)
    curve = score(plain, SliceGPT(), store, tokens).curves["residual"]
    assert len(seen) == 2 * len(model.blocks)
    for size in (0, 8, 20):
        energies = [torch.linalg.svdvals(x.flatten(0, 1)).square() for x in seen]
        shares = [float(e[size:].sum() / e.sum()) for e in energies]
        assert curve.at(size) == pytest.approx(sum(shares) / len(shares))
    assert curve.at(HIDDEN) == 0


def test_padding_turns_nothing(opened, tokens):
    """A basis is that of the real tokens, whatever stands behind them."""
    mask = torch.ones_like(tokens.mask)
    mask[:, 20:] = False
    found = []
    for ids in (tokens.ids, tokens.ids.masked_fill(~mask, 5)):
        model = opened("llama", "float64")
        (unit,) = SliceGPT().units(model, 1)
        line = Slicing(model, SliceGPT(), unit, 12, Tokens(ids, mask))
        found.append(line.cut(model.blocks[0], Needs.BEHIND_GRAM))
    torch.testing.assert_close(*(basis @ basis.T for basis in found))


class AnyBasis(SliceGPT):
    """Directions that nothing has chosen."""

    def solve(self, unit, block, statistics):
        def at(size):
            return Narrowing(encode=torch.linalg.qr(torch.randn(HIDDEN, size).double()).Q)

        return Solution(None, at)


def test_logits_err_less_with_more_directions_and_more_with_any(opened, tokens):
    dense = logits(opened("llama", "float64"))

    def error(size, method):
        torch.manual_seed(size)
        model = cut(opened("llama", "float64"), size, tokens, method)
        return float((logits(model) - dense).square().mean() / dense.var())

    errors = [error(size, SliceGPT()) for size in (10, 18, 26)]
    assert errors[0] > errors[1] > errors[2] > 0
    assert errors[1] < 0.8 * error(18, AnyBasis())


@dataclass
class Made:
    """A written checkpoint, and the model in memory."""

    folder: object
    plan: object
    memory: dict
    ids: torch.Tensor
    model: object


@pytest.fixture(scope="module")
def made(opened, tokens, tmp_path_factory):
    def make(name, keep=0.8, dtype=torch.float32):
        model, store, method = opened(name), Store(), SliceGPT()
        model.stored = dtype
        calibrate(model, tokens, method.needs, store)
        evidence = score(model, method, store, tokens)
        record = Calibration("stream", 6, 32, 0)
        budget = Budget(keep=keep, multiple_of=2)
        plan = make_plan(model, method, evidence, record, tokens, budget=budget)
        folder = tmp_path_factory.mktemp("sliced") / name
        prepared = prepared_of(model, SimpleNamespace(tokens=tokens, store=store), plan)
        memory, read = write(prepared, folder, RunContext())
        return Made(folder, plan, memory, read.ids, model)

    return make


@pytest.mark.parametrize("name", ["llama_biased_tied", "qwen2", "qwen3", "phi3_partial"])
def test_a_plan_counts_what_the_checkpoint_holds(dense, opened, made, name):
    done = made(name)
    (row,) = done.plan.units
    tensors = load_file(done.folder / "model.safetensors")
    stream = [k for k in tensors if k.startswith("model.layers.") and "norm" not in k]
    # Biases that are added to the stream shrink along, but no method counts them.
    counted = [k for k in stream if not k.endswith(("o_proj.bias", "down_proj.bias"))]
    assert row.parameters == sum(tensors[key].numel() for key in counted)
    assert sum("shortcut" in key for key in counted) == 6
    before = load_file(dense(name) / "model.safetensors")
    sizes = [sum(t.numel() for t in found.values()) for found in (before, tensors)]
    (unit,) = SliceGPT().units(opened(name), 2)
    assert 4 * (sizes[0] - sizes[1]) == unit.cost(HIDDEN, 4).bytes - row.bytes
    assert row.flops_per_token == 2 * sum(
        tensors[k].numel() for k in counted if tensors[k].dim() == 2
    )


def test_keep_counts_what_it_counts_for_other_methods(opened):
    for name in ("llama_biased_tied", "qwen3", "phi3"):
        (unit,) = SliceGPT().units(opened(name), 8)
        others = opened(name).units(8, WHOLE_HEADS)
        assert unit.parameters(unit.size) == sum(other.parameters(other.size) for other in others)


@pytest.mark.parametrize("keep", [0.3, 0.7, 0.9, 0.99, 1.0])
def test_the_largest_size_that_fits_is_taken(opened, keep):
    units = SliceGPT().units(opened("qwen3"), 2)
    prices = counted(units, "parameters", 4)
    found = Uniform().allocate(units, None, prices, keep)["residual"]
    whole = units[0].parameters(HIDDEN)
    below = [size for size in range(2, HIDDEN, 2) if units[0].parameters(size) <= keep * whole]
    assert found == (HIDDEN if keep == 1 else max(below))
    assert units[0].parameters(HIDDEN - 2) > whole  # shortcuts cost more than so small a cut saves


@pytest.mark.parametrize("name", ["llama_biased_tied", "qwen3"])
def test_a_checkpoint_says_what_was_in_memory(made, name):
    done = made(name)
    config = json.loads((done.folder / "config.json").read_text())
    assert config["hidden_size"] == HIDDEN
    assert not config["tie_word_embeddings"]
    loaded = AutoModelForCausalLM.from_pretrained(done.folder, dtype=torch.float32)
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight
    assert loaded.lm_head.weight.shape == loaded.model.embed_tokens.weight.shape
    ids = done.ids
    with torch.inference_mode():
        assert spread(loaded.lm_head.weight, loaded.model.embed_tokens.weight) > 0.1
        assert spread(loaded(ids).logits[0], done.memory["logits.float32.sdpa"]) < 2e-5
    said = [
        loaded.generate(ids, max_new_tokens=8, do_sample=False, use_cache=cached, pad_token_id=0)
        for cached in (True, False)
    ]
    assert torch.equal(*said)


def test_in_half_precision_no_norm_is_rounded(made):
    """√(d/k) as the weight of a norm would be off by as much everywhere."""
    done = made("llama", dtype=torch.bfloat16)
    tensors = load_file(done.folder / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    norms = [t for key, t in tensors.items() if key.endswith("norm.weight")]
    assert len(norms) == 7
    assert all(bool((norm == 1).all()) for norm in norms)


def test_every_entry_is_of_a_family():
    turning = [family.model_types[0] for family in ANATOMIES if family.pre_norm is not None]
    assert sorted(turning) == sorted(PRE_NORMS)


@pytest.mark.parametrize("name", ["opt", "gpt2", "gpt_neox", "gemma", "olmo2", "cohere"])
def test_a_family_that_cannot_turn_is_refused_early(opened, name):
    model = opened(name)
    assert SliceGPT().units(model, 8) == []
    with pytest.raises(InputError, match=r"residual stream stays.*that can: auto") as seen:
        check_reach(model, step_of(SliceGPT(), allocator=Uniform()))
    able = str(seen.value).rsplit(": ", 1)[1].rstrip(".").split(", ")
    assert set(able) < set(METHODS)
    assert "slicegpt" not in able
    for other in able:
        check_served(method_class(other)(), model)


def test_what_goes_by_blocks_is_refused_early(opened, tokens):
    model, method = opened("llama"), SliceGPT()
    check_reach(model, step_of(method, 0.5))
    with pytest.raises(InputError, match="'knapsack' goes by blocks"):
        check_reach(model, step_of(method, 0.5, Knapsack()))
    with pytest.raises(InputError, match="'knapsack' goes by blocks"):
        score(model, method, Store(), tokens, Knapsack())
    with pytest.raises(InputError, match="another --target"):
        check_reach(model, step_of(method, 0.5, target="latency"))
    with pytest.raises(InputError, match="no size that may change here changes the bytes of KV"):
        check_reach(model, step_of(method, 0.5, target="cache"))
    with pytest.raises(InputError, match="--tier plain keeps those that would"):
        check_reach(model, step_of(method, 0.5, PlainWidth(), tier="plain"))
    check_served(MoDeGPT(), model)
