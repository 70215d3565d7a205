"""Apple's GPUs, which have no float64: all that needs it is done on the CPU. On an imitation."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from secateur import (
    Budget,
    Calibration,
    InputError,
    Settings,
    Store,
    calibrate,
    compress,
    export_dense,
    make_plan,
    open_model,
)
from secateur.distributed.collectives import Ranks
from secateur.evaluate.agreement import agreement, outputs
from secateur.evaluate.perplexity import answered
from secateur.methods import method_class
from secateur.methods.gauss_newton import GaussNewton
from secateur.models.streamed_loading import open_streamed
from secateur.pipeline.compress_stage import write
from secateur.pipeline.context import RunContext
from secateur.pipeline.shared_model import open_shared
from secateur.scoring.evidence import score
from tests.support import families
from tests.support.imitation import apple, on_mps
from tests.support.steps import prepared_of

CPU, MPS = Settings(device="cpu", dtype="float32"), Settings(device="mps", dtype="float32")
CASES = [
    ("auto", "llama", False),
    ("auto", "gpt2", True),
    ("modegpt", "gpt2", False),
    ("modegpt", "llama", True),
    ("svd-llm", "llama", False),
    ("llm-pruner", "llama", False),
    ("replace", "gpt2", False),
    ("slicegpt", "llama", False),
    ("ziplm", "gpt2", False),
]


def prepared(folder, method, tokens, settings, streams=False):
    """A model with its plan, by all that comes before a weight changes."""
    model = open_streamed(str(folder), settings) if streams else open_model(folder, settings)
    store = Store()
    calibrate(model, tokens, method.needs | method.allocator.needs, store)
    evidence = score(model, method, store, tokens)
    budget = Budget()
    plan = make_plan(model, method, evidence, Calibration(), tokens, budget=budget, store=store)
    data = SimpleNamespace(tokens=tokens, store=store)
    return prepared_of(model, data, plan, method, evidence)


def written(given, folder):
    """The weights of the plan's checkpoint, and what the narrowed model says."""
    said = write(given, folder / "out", RunContext(), folder / "narrowing")
    return load_file(folder / "out" / "model.safetensors"), said.said


def close(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(("name", "variant", "streams"), CASES)
def test_plan_and_weights_are_those_of_the_cpu(dense, tmp_path, name, variant, streams):
    """The mistakes: float64 on the device, a sum or a solution left on the other one."""
    method, tokens = method_class(name)(), families.read(variant, 16, 32)
    expected = prepared(dense(variant), method, tokens, CPU, streams)
    weights, said = written(expected, tmp_path / "cpu")
    with apple():
        found = prepared(dense(variant), method, tokens, MPS, streams)
        assert found.model.device.type == "mps"
        own, reference_outputs = written(found, tmp_path / "mps")
        held = [t for t in found.model.module.parameters() if not t.is_meta]
        assert held
        assert all(map(on_mps, held))
    assert found.plan.sizes == expected.plan.sizes
    assert found.plan.budget.reached < 1
    close(own, weights)
    close(reference_outputs, said)


def test_the_gauss_newton_step_is_taken(dense, tmp_path, monkeypatch):
    """Of the cases above, for one, it would be dropped where its error came out wrong."""
    taken, refit = [], GaussNewton._refit

    def counted(step, block, rows):
        taken.append(block.index)
        refit(step, block, rows)

    monkeypatch.setattr(GaussNewton, "_refit", counted)
    method, tokens = method_class("auto")(), families.read("llama", 16, 32)
    written(prepared(dense("llama"), method, tokens, CPU), tmp_path / "cpu")
    alone, taken[:] = [*taken], []
    with apple():
        written(prepared(dense("llama"), method, tokens, MPS), tmp_path / "mps")
    assert taken == alone != []


@pytest.mark.parametrize("variant", ["llama", "gpt2"])
def test_what_is_judged_is_that_of_the_cpu(dense, variant):
    tokens = families.read(variant, 16, 32)
    model = open_model(dense(variant), CPU)
    expected, spoken = answered(model, tokens), outputs(model, tokens)
    with apple():
        model = open_model(dense(variant), MPS)
        found, said = answered(model, tokens), outputs(model, tokens)
        assert not on_mps(said)
        compared = agreement(spoken, said)
    assert found == pytest.approx(expected, rel=1e-5)
    assert compared["kl"] < 1e-8
    assert compared["top1"] == 1.0


def test_half_precision(dense):
    """As most models are stored: products of a batch are made in float32 there, too."""
    method, tokens = method_class("modegpt")(), families.read("llama", 16, 32)
    half = replace(CPU, dtype="bfloat16")
    expected = prepared(dense("llama"), method, tokens, half).plan
    with apple():
        found = prepared(dense("llama"), method, tokens, replace(half, device="mps")).plan
    assert found.sizes == expected.sizes


def test_float64_on_the_device_fails(dense, monkeypatch):
    """So these tests do tell the wrong version, which works where the model is."""
    monkeypatch.setattr("secateur.utils.precision.exact_device", lambda device: device)
    tokens = families.read("llama", 4, 32)
    with apple():
        model = open_model(dense("llama"), MPS)
        with pytest.raises(TypeError, match="float64"):
            calibrate(model, tokens, frozenset(), Store())


def test_the_imitation_refuses_what_the_device_does():
    with apple():
        there, here = torch.ones(2, 3, device="mps"), torch.ones(2, 3)
        assert on_mps(there[0].t() + 1)
        assert on_mps(nn.Parameter(there))
        assert on_mps(nn.Linear(3, 3).to("mps")(there))
        assert not on_mps(there.cpu())
        assert torch.equal(there.cpu(), here)
        for wrong in (
            lambda: there.double(),
            lambda: there.sum(dtype=torch.float64),
            lambda: there.to("cpu", torch.float64),
            lambda: here.double().to("mps"),
            lambda: torch.zeros(1, dtype=torch.float64, device="mps"),
            lambda: here.double().copy_(there),
            lambda: there.numpy(),
        ):
            with pytest.raises(TypeError):
                wrong()
        for wrong in (
            lambda: there + here,
            lambda: here @ there.t(),
            lambda: here[there > 0],
            lambda: torch.cat((here, there)),
            lambda: nn.Linear(3, 3)(there),
        ):
            with pytest.raises(RuntimeError, match="same device"):
                wrong()
        with pytest.raises(NotImplementedError):
            torch.linalg.eigh(there @ there.t())


def test_a_block_is_read_on_the_cpu_and_is_there_again(dense):
    """With the very tensors that it had, which others share, whatever happens meanwhile."""
    with apple():
        block = open_model(dense("gpt2"), MPS).blocks[0]
        before = dict(block.module.named_parameters())

        def looked_at():
            with block.solving():
                for name, copy in block.module.named_parameters():
                    assert not on_mps(copy)
                    assert torch.equal(copy, before[name].cpu())
                raise InputError("stopped")

        with pytest.raises(InputError, match="stopped"):
            looked_at()
        after = dict(block.module.named_parameters())
        assert all(after[name] is tensor and on_mps(tensor) for name, tensor in before.items())
    block = open_model(dense("gpt2"), CPU).blocks[0]
    before = dict(block.module.named_parameters())
    with block.solving():
        assert all(t is before[name] for name, t in block.module.named_parameters())


def test_what_is_not_served_there_is_refused_by_name(dense, tmp_path):
    folder, out = dense("llama"), tmp_path / "out"
    method = method_class("modegpt")()
    text = tmp_path / "text.txt"
    text.write_text(families.words(2000))
    asked = {"calibration": Calibration(str(text), 8, 32), "settings": MPS}
    timed = Budget(keep=0.7, target="latency", length=32)
    with apple():
        for refused, told in (
            (lambda: compress(folder, out, method, timed, **asked), "latency"),
            (lambda: export_dense(folder, out, MPS), "export"),
            (lambda: open_shared(str(folder), MPS, tmp_path, Ranks(0, 2)), "processes"),
            (lambda: open_model(folder, replace(MPS, dtype="float64")), "float64"),
        ):
            with pytest.raises(InputError, match=rf"--device mps.*{told}.*cpu"):
                refused()
        assert Settings().torch_device().type != "mps"
    assert not out.exists()
    with pytest.raises(InputError, match=r"--device mps.*Try cpu"):
        MPS.torch_device()
