"""Low rank: Eckart-Young, in the metric of what a layer reads, and by one threshold."""

import pytest
import torch

from secateur import Budget, InputError, make_plan, score
from secateur.layers import integers
from secateur.layers.factored_secateur import LowRank
from secateur.layers.forms_secateur import FORMS, build, fill
from secateur.methods import method_class
from secateur.methods.form import Metric
from secateur.methods.forms import Forms
from secateur.methods.svd import SVD
from secateur.methods.svd_llm import SVDLLM
from secateur.methods.welore import LowRankWeLore
from secateur.structure.parametrizations import form_of, smaller
from secateur.structure.units import Matrix


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layered(method, weight, metric, rank):
    (form,) = (f for f in method.forms(*weight.shape, False) if f.spec["rank"] == rank)
    return method.layer(weight, metric, form, None, torch.float64)


METRICS = {
    "identity": lambda n: Metric(torch.eye(n, dtype=torch.float64)),
    "any": lambda n: Metric(
        (x := noise(3 * n, n, seed=1) * torch.arange(1, n + 1)).t() @ x / len(x)
    ),
    "singular": lambda n: Metric((x := noise(n // 2, n, seed=2)).t() @ x / len(x)),
}


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("shape", [(12, 8), (6, 20), (9, 9)])
def test_the_error_is_the_sum_of_the_discarded_energies(kind, shape):
    """An SVD of the weight alone, in its place, is worse: the mistake."""
    weight, metric, method = noise(*shape), METRICS[kind](shape[1]), SVDLLM(rank_step=1, ridge=0)
    forms = method.forms(*shape, False)
    energies = torch.linalg.svdvals(weight @ metric.whitening[0]).square()
    for form, predicted in zip(forms, method.errors(weight, metric, forms), strict=True):
        rank = form.spec["rank"]
        made = layered(method, weight, metric, rank).dense()
        assert metric.error(weight - made) == pytest.approx(predicted, rel=1e-8, abs=1e-9)
        assert predicted == pytest.approx(float(energies[rank:].sum()), rel=1e-9, abs=1e-12)
        plain = layered(SVD(rank_step=1), weight, Metric.identity(shape[1], weight), rank).dense()
        worse = metric.error(weight - plain)
        assert worse > predicted + 1e-9 if kind == "any" else worse >= predicted - 1e-9


@pytest.mark.parametrize("method", [SVD(rank_step=1), SVDLLM(rank_step=1)])
def test_errors_are_known_in_any_metric(method):
    weight, seen, judged = noise(9, 12), METRICS["any"](12), METRICS["singular"](12)
    forms = method.forms(9, 12, False)
    errors = method.errors(weight, seen, forms, judged)
    for form, predicted in zip(forms, errors, strict=True):
        made = layered(method, weight, seen, form.spec["rank"]).dense()
        assert judged.error(weight - made) == pytest.approx(predicted, rel=1e-9)


def test_a_mixture_decomposes_once_for_all_ranks(monkeypatch):
    """For every rank anew it takes hours for a matrix of common size."""
    weight, metric, calls = noise(64, 64), METRICS["any"](64), []
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: calls.append(1) or svd(*a, **k))
    mixture = Forms(of="svd-llm,svd")
    forms = mixture.forms(64, 64, False)
    assert len(forms) == 6
    errors = mixture.errors(weight, metric, forms)
    assert len(calls) == 2
    for form, predicted in zip(forms, errors, strict=True):
        made = mixture.layer(weight, metric, form, None, torch.float64).dense()
        assert metric.error(weight - made) == pytest.approx(predicted, rel=1e-9)


def test_a_mixture_says_before_the_work_that_a_library_is_missing(opened, monkeypatch):
    monkeypatch.setattr(integers, "find_spec", lambda _: None)
    assert "pip install" in Forms(of="svd-llm,rtn").obstacle(opened("llama"))
    assert Forms(of="svd-llm,svd").obstacle(opened("llama")) is None


def test_a_share_is_one_of_the_bytes_that_a_model_has():
    """Forms in order by four bytes a number are in another order by two."""
    shape = {"outputs": 64, "inputs": 64}
    low = form_of({"form": "low_rank", **shape, "bias": False, "rank": 7}, "rank 7")
    trits = form_of({"form": "trits", **shape, "bias": False, "group": 64}, "trits")
    forms = smaller([low, trits], 64, 64, 4)
    assert [form.label for form in forms] == ["trits", "rank 7"]
    common = {"block": 0, "step": 1, "hidden": 64, "paths": ("",), "order": 0, "published": True}
    unit = Matrix(name="m", size=3, forms=forms, itemsize=4, **shape, **common)
    for size in (1, 2, 3):
        assert unit.at_share(unit.cost(size, 4).bytes / (64 * 64 * 4)) == pytest.approx(size)


def test_no_other_matrix_of_that_rank_is_nearer():
    """Against gradient descent on the factors from several starts."""
    weight, metric = noise(7, 6), METRICS["any"](6)
    best = metric.error(weight - layered(SVDLLM(rank_step=1, ridge=0), weight, metric, 2).dense())
    for seed in range(3):
        factors = [noise(7, 2, seed=seed).requires_grad_(), noise(2, 6, seed=9).requires_grad_()]
        optimizer = torch.optim.LBFGS(factors, max_iter=300, line_search_fn="strong_wolfe")

        def closure(factors=factors, optimizer=optimizer):
            optimizer.zero_grad()
            gap = weight - factors[0] @ factors[1]
            loss = torch.einsum("oi,ij,oj->", gap, metric.gram, gap)
            loss.backward()
            return loss

        optimizer.step(closure)
        found = metric.error((weight - factors[0] @ factors[1]).detach())
        assert found >= best * (1 - 1e-9)


@pytest.mark.parametrize("method", [SVD(rank_step=1), SVDLLM(rank_step=1, ridge=0)])
def test_a_planted_rank_is_recovered(method):
    weight, metric = noise(10, 3) @ noise(3, 12, seed=4), METRICS["any"](12)
    if isinstance(method, SVD) and not isinstance(method, SVDLLM):
        metric = Metric.identity(12, weight)
    torch.testing.assert_close(layered(method, weight, metric, 3).dense(), weight)


def test_ranks_that_save_nothing_are_not_offered():
    """The mistake: ranks above outputs · inputs / (outputs + inputs), which take more."""
    for outputs, inputs in ((64, 64), (64, 172), (8, 8), (3, 2)):
        forms = SVD(rank_step=1).forms(outputs, inputs, False)
        assert all(form.numbers < outputs * inputs for form in forms)
        most = max((form.spec["rank"] for form in forms), default=0)
        assert (most + 1) * (outputs + inputs) >= outputs * inputs


def test_factors_take_the_bytes_that_their_form_says():
    (form, *_) = SVD(rank_step=4).forms(24, 40, True)
    layer = build(form.spec).to(torch.bfloat16)
    own = {n: t.numel() * t.element_size() for n, t in layer.state_dict().items() if n != "bias"}
    assert sum(own.values()) == form.bytes(2) == 2 * 4 * 64
    assert form.multiplications == 4 * 64


@pytest.mark.parametrize("bias", [None, torch.arange(5.0)])
def test_a_layer_computes_what_its_dense_weight_would(bias):
    spec = {"form": "low_rank", "outputs": 5, "inputs": 4, "bias": bias is not None, "rank": 2}
    tensors = {"first.weight": noise(2, 4), "second.weight": noise(5, 2, seed=1)}
    layer, x = fill(spec, tensors, bias, torch.float32), noise(3, 2, 4, seed=2).float()
    expected = x @ (tensors["second.weight"] @ tensors["first.weight"]).float().t()
    torch.testing.assert_close(layer(x), expected if bias is None else expected + bias)
    again = build(spec)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rank": 5}, "at most 4"),
        ({"rank": 0}, "above 0"),
        ({"rank": True}, "above 0"),
        ({"rank": 2.0}, "above 0"),
        ({"outputs": 2**40}, "above 0"),
        ({"bias": 1}, "truth value"),
        ({"form": "pickle"}, "low_rank"),
        ({"more": 1}, "whole numbers"),
    ],
)
def test_specs_out_of_bounds_are_refused(change, words):
    spec = {"form": "low_rank", "outputs": 8, "inputs": 4, "bias": False, "rank": 2}
    with pytest.raises(ValueError, match=words):
        build(spec | change)


def test_every_form_has_a_name_of_its_own():
    assert all(layer.form == name for name, layer in FORMS.items())
    assert FORMS["low_rank"] is LowRank


def test_welore_keeps_dense_what_factors_would_not_shrink(opened, calibrated):
    """One threshold: flat spectra stay dense, steep ones take the cut; the budget is of bytes."""
    model, data = opened("llama", "float64"), calibrated("llama")
    for block in model.blocks:
        steep = block.attention.module.o_proj.weight
        left, values, right = torch.linalg.svd(steep, full_matrices=False)
        steep.data = left @ (values * 0.3 ** torch.arange(len(values))).diag() @ right
    method = LowRankWeLore(rank_step=1)
    evidence = score(model, method, data.store, data.tokens)
    budget = Budget(keep=0.9)
    plan = make_plan(model, method, evidence, data.record, data.tokens, budget=budget)
    assert 0.85 < plan.budget.reached <= 0.9
    of = {row.unit.rpartition(".")[2]: [] for row in plan.units}
    for row in plan.units:
        of[row.unit.rpartition(".")[2]].append(row.form)
    assert all(form is not None and form["rank"] <= 6 for form in of["o_proj"])
    assert any(form is None for name in ("gate_proj", "up_proj", "down_proj") for form in of[name])


def test_keep_may_be_as_little_as_there_is():
    assert Budget().of(SVD).keep == "least"
    assert Budget(keep="least").of(SVD()) == Budget().of(SVD())
    for keep in (-0.1, 0, 1.1, True, "all"):
        with pytest.raises(InputError, match="keep"):
            Budget(keep=keep)
    with pytest.raises(InputError, match="auto prunes"):
        Budget(keep="least").of(method_class("auto"))
