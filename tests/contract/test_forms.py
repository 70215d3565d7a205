"""What every method that gives matrices another form owes to its users."""

from functools import cache

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from secateur import Budget, Settings, make_plan, open_model, score
from secateur.allocate.uniform import Uniform
from secateur.apply.surgery import narrowed
from secateur.methods import method_class, method_classes
from secateur.models.linear_ops import dense_weight, inputs_by_outputs
from secateur.pipeline.compress_stage import write
from secateur.pipeline.context import RunContext
from secateur.pipeline.multi_step import stored_bytes
from secateur.structure.units import MATRICES
from tests.contract.conftest import ROUNDING, asked_with, spread
from tests.contract.reading import Job
from tests.contract.variants import VARIANTS
from tests.support import met
from tests.support.families import AUTO, FAMILIES
from tests.support.steps import prepared_of

RESHAPING = [name for name, kind in method_classes().items() if kind.kinds == MATRICES]
RESHAPING += [name for name in VARIANTS if " " in name]  # with other options
SHOWN = ("llama", "gpt2")  # one without biases, one with transposed weights and biases
every_method = pytest.mark.parametrize("method", RESHAPING)
every_name = pytest.mark.parametrize(
    "name", [*SHOWN, *(pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES if n not in SHOWN)]
)


def made(method, **options):
    """The method at sizes that fit models this small."""
    return method_class(method.partition(" ")[0])(**{**VARIANTS.get(method, {}), **options})


def served(model, method):
    if method.obstacle(model) is not None:
        pytest.skip(f"{method.name} has no form for this model")


@pytest.fixture(scope="session")
def evidence(opened, calibrated):
    @cache
    def measured(method, name):
        data = calibrated(name)
        return score(opened(name), made(method), data.store, data.tokens, Uniform())

    return measured


@pytest.fixture(scope="session")
def reshaped(opened, calibrated, evidence, tmp_path_factory):
    """Method, variant and keep to a written checkpoint, its plan and what memory said."""
    root = tmp_path_factory.mktemp("forms")

    @cache
    def checkpoint(method, name, keep):
        model, data = opened(name), calibrated(name)
        chosen = made(method)
        given = (model, chosen, evidence(method, name), data.record, data.tokens)
        plan = make_plan(*given, budget=Budget(keep=keep or "least"), allocator=Uniform())
        folder = root / f"{method}-{name}-{keep}"
        memory, tokens = write(prepared_of(model, data, plan, chosen), folder, RunContext())
        met.note_written(model, plan)
        return folder, plan, memory, tokens

    return checkpoint


@every_name
@every_method
def test_a_reloaded_model_says_what_memory_said(opened, reshaped, method, name):
    served(opened(name), made(method))
    folder, plan, memory, tokens = reshaped(method, name, 0.0)
    model = open_model(folder, Settings(device="cpu"))
    assert model.narrowed == (plan.tier != "plain")
    with torch.inference_mode():
        found = model.module(**model.use.inputs(tokens)).logits[0]
    assert spread(found, memory["logits.float32.eager"]) < ROUNDING


@every_name
@every_method
def test_bytes_on_disk_are_those_of_the_plan(opened, reshaped, method, name):
    served(opened(name), made(method))
    folder, plan, *_ = reshaped(method, name, 0.0)
    files = [load_file(path) for path in folder.glob("*.safetensors")]
    sizes = {n: t.numel() * t.element_size() for file in files for n, t in file.items()}
    changed = [row for row in plan.units if row.form is not None]
    assert changed
    for row in changed:
        inside = [f".{linear.removeprefix('layers.')}." for linear in row.linears]
        weights = {n: s for n, s in sizes.items() if not n.endswith(".bias")}
        own = {n: s for n, s in weights.items() if any(path in n for path in inside)}
        assert sum(own.values()) == row.bytes, (row, own)


@every_name
@every_method
def test_keeping_everything_changes_nothing(opened, reshaped, method, name):
    served(opened(name), made(method))
    folder, plan, _, tokens = reshaped(method, name, 1.0)
    assert plan.tier == "plain"
    assert plan.budget.reached == 1
    model, dense = open_model(folder, Settings(device="cpu")), opened(name)
    with torch.inference_mode():
        found, expected = (m.module(**m.use.inputs(tokens)).logits for m in (model, dense))
    assert torch.equal(found, expected)


@every_name
@every_method
def test_a_budget_is_met(opened, reshaped, method, name):
    served(opened(name), made(method))
    least = reshaped(method, name, 0.0)[1].budget.reached
    keep = (1 + least) / 2
    _, plan, *_ = reshaped(method, name, keep)
    assert plan.budget.of == "bytes"
    assert plan.budget.reached <= keep
    spent = plan.budget.reached * plan.budget.total
    assert sum(row.bytes for row in plan.units) == pytest.approx(spent)


@every_name
@every_method
def test_every_layer_computes_with_the_weight_that_it_stands_for(opened, calibrated, method, name):
    model, chosen, generator = opened(name, "float64"), made(method), torch.Generator()
    served(model, chosen)
    data, block = calibrated(name), model.blocks[1]
    statistics = data.store.get(1, chosen.needs)
    for unit in (u for u in chosen.units(model, 1) if u.block == 1 and not u.fixed):
        solution = chosen.solve(unit, block, statistics)
        x = torch.randn(2, 5, unit.inputs, generator=generator, dtype=torch.float64)
        for size in sorted({unit.sizes()[0], unit.sizes()[-2]}):
            layers = solution.at(size).layers
            assert tuple(layers) == unit.paths
            for path, layer in layers.items():
                old = block.module.get_submodule(path)
                expected = x @ dense_weight(layer).t()
                if old.bias is not None:
                    expected = expected + old.bias
                with torch.no_grad():
                    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)
                assert (layer.bias is None) == (old.bias is None)


@every_name
@every_method
def test_predicted_errors_are_those_of_what_is_made(opened, calibrated, method, name):
    model, chosen = opened(name, "float64"), made(method)
    served(model, chosen)
    data, block = calibrated(name), model.blocks[1]
    statistics = data.store.get(1, chosen.needs)
    for unit in (u for u in chosen.units(model, 1) if u.block == 1 and not u.fixed):
        solution = chosen.solve(unit, block, statistics)
        group = [found for found in block.linear_layers if found.path in unit.paths]
        metric = chosen.metric(group[0], statistics)
        weight = torch.cat([inputs_by_outputs(linear.module).t().double() for linear in group])
        for size in sorted({unit.sizes()[0], unit.sizes()[-2]}):
            stands = torch.cat([dense_weight(x) for x in solution.at(size).layers.values()])
            lost = metric.error(weight - stands)
            share = min(1.0, lost / metric.error(weight))
            whole = solution.curve.at(0)  # 1, where curves are shares
            assert solution.curve.at(size) == pytest.approx(
                share * whole, rel=1e-3, abs=1e-9
            )  # but for ridges
        assert solution.curve.at(unit.size) == 0


@pytest.mark.parametrize("name", ["bert", "vit", "t5"])
def test_base_models_open_and_feed_forwards_find_what_they_ask_for(reshaped, name):
    """A pooler that the checkpoint has not is no damage; T5 looks at a weight's number format."""
    folder, *_ = reshaped("svd", name, 0.0)
    AutoModel.from_pretrained(folder)


def test_bytes_of_blocks_are_found_under_published_names(opened, reshaped):
    """ViT's blocks have other names in files than in memory."""
    model = opened("vit")
    folder, plan, *_ = reshaped("rtn", "vit", 0.0)
    assert plan.tier == "plain"
    dense = sum(p.numel() for block in model.blocks for p in block.module.parameters())
    changed = sum(row.bytes - row.dense_bytes for row in plan.units)
    assert stored_bytes(folder, model) == 4 * dense + changed


@every_method
def test_looking_at_a_form_leaves_the_block_as_it_was(opened, calibrated, method):
    model, chosen = opened("llama"), made(method)
    served(model, chosen)
    statistics = calibrated("llama").store.get(0, chosen.needs)
    block, unit = model.blocks[0], next(u for u in chosen.units(model, 1) if not u.fixed)
    before = {n: t.clone() for n, t in block.module.state_dict().items()}
    layers = {path: block.module.get_submodule(path) for path in unit.paths}
    with narrowed(block, unit, chosen.solve(unit, block, statistics).at(1)):
        assert all(block.module.get_submodule(p) is not layer for p, layer in layers.items())
    assert all(block.module.get_submodule(p) is layer for p, layer in layers.items())
    after = block.module.state_dict()
    assert all(torch.equal(after[n], t) for n, t in before.items())


def test_strangers_read_every_form(reshaped, opened, readers):
    """Without this package, by the code beside the weights; caches, padding, saving again."""
    jobs, memories = {}, {}
    for method in RESHAPING:
        if made(method).obstacle(opened("llama")) is not None:
            continue
        folder, plan, memory, tokens = reshaped(method, "llama", 0.0)
        job = f"{method}/{'plain' if plan.tier == 'plain' else 'layered'}"
        jobs[job] = Job(folder, AUTO["causal"], asked_with("llama", tokens))
        memories[job] = memory["logits.float32.eager"]
    for job, read in readers("stranger").read(jobs).items():
        assert read.facts["missing"] == read.facts["unexpected"] == []
        assert read.facts["without_gradient"] == []
        said = read.tensors
        for kind in ("eager", "sdpa", "again"):
            assert spread(said[f"logits.{kind}"], memories[job]) < ROUNDING, (job, kind)
        assert torch.equal(said["cached.sdpa"], said["uncached.sdpa"])
        assert torch.equal(said["padded.sdpa"], said["alone"])


@pytest.mark.parametrize("method", RESHAPING)
def test_the_same_calibration_gives_the_same_bits(opened, calibrated, method):
    model, chosen = opened("llama"), made(method)
    served(model, chosen)
    statistics = calibrated("llama").store.get(0, chosen.needs)
    unit = next(u for u in chosen.units(model, 1) if not u.fixed)
    tries = [chosen.solve(unit, model.blocks[0], statistics).at(1).layers for _ in range(2)]
    for path in unit.paths:
        first, second = (layers[path].state_dict() for layers in tries)
        assert all(torch.equal(first[name], second[name]) for name in first)
