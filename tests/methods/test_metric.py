"""What an error of a weight does to outputs, and how forms of different kinds are compared."""

import math

import pytest
import torch

from secateur.methods.form import Metric
from secateur.methods.svd_llm import SVDLLM
from secateur.scoring.divergence import by_error, measured_sizes
from secateur.structure.error_curve import Curve
from secateur.structure.form import Form
from secateur.structure.units import Matrix


def gram(rows, inputs, seed=0):
    x = torch.randn(
        rows, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return x, x.t() @ x / rows


def matrix(*sizes, outputs=16, inputs=16):
    forms = tuple(Form({}, f"{n}", n, 0, n, n) for n in sizes)
    return Matrix(
        "layers.0.m", 0, len(forms) + 1, 1, 16, least=1, paths=("m",), outputs=outputs,
        inputs=inputs, forms=forms, order=0, published=True,
    )  # fmt: skip


def test_the_error_is_the_mean_square_of_what_outputs_change_by():
    x, own = gram(50, 6)
    change = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = (x @ change.t()).square().sum(1).mean()
    assert Metric(own).error(change) == pytest.approx(float(expected))


@pytest.mark.parametrize(("rows", "rank"), [(50, 6), (3, 3)])
def test_whitening_is_a_root_and_its_pseudo_inverse(rows, rank):
    """A Cholesky factor, in its place, would not exist where there is less text than inputs."""
    _, own = gram(rows, 6)
    root, inverse = Metric(own).whitening
    torch.testing.assert_close(root @ root.t(), own)
    torch.testing.assert_close(root @ inverse @ root, root)
    assert round(float(torch.trace(inverse @ root))) == rank
    shifted = Metric(own, 0.1)
    torch.testing.assert_close(
        shifted.whitening[0] @ shifted.whitening[0].t(),
        own + 0.1 * own.diagonal().mean() * torch.eye(6, dtype=torch.float64),
    )


def test_a_size_is_the_share_of_bytes_that_it_keeps():
    unit = matrix(64, 128, 192)
    for share, size in ((0.25, 1), (0.5, 2), (0.75, 3), (1.0, 4), (0.625, 2.5), (0.1, 1)):
        assert unit.at_share(share) == pytest.approx(size)
    assert [unit.cost(size, 2).bytes for size in unit.sizes()] == [128, 256, 384, 512]
    assert [unit.described(size) for size in unit.sizes()] == ["64", "128", "192", "dense"]


def test_losses_of_forms_go_by_error_and_not_by_size():
    """Forms of two kinds: the third is larger than the second, and worse."""
    curve = Curve((1.0, 0.5, 0.01, 0.2, 0.001, 0.0))
    found = by_error({1: 2.0, 4: 0.002, 5: 0.0}, curve)
    assert found.at(1) == 2.0
    assert found.at(4) == 0.002
    assert found.at(5) == 0
    assert found.at(2) < found.at(3)
    slope = math.log(2.0 / 0.002) / math.log(0.5 / 0.001)
    assert found.at(2) == pytest.approx(0.002 * 10**slope)
    assert found.at(0) == pytest.approx(2.0 * 1.0 / 0.5)  # beyond, in proportion


def test_a_larger_error_is_never_taken_for_a_smaller_loss():
    found = by_error({1: 0.1, 2: 0.3, 3: 0.0}, Curve((1.0, 0.5, 0.1, 0.0)))
    assert found.at(1) >= found.at(2) == 0.3


def test_forms_are_measured_over_the_range_of_their_errors():
    unit = matrix(10, 20, 30, 40, 50)
    curve = Curve((1.0, 0.4, 0.3, 0.04, 0.004, 0.0039, 0.0))
    assert measured_sizes(unit, curve) == [1, 3, 4]


def test_where_nothing_is_read_any_metric_does():
    """A scale of next to nothing has an inverse that no number format holds."""
    weight, silent = torch.ones(4, 6, dtype=torch.float64), torch.zeros(6, 6, dtype=torch.float64)
    method = SVDLLM(rank_step=1)
    form = method.forms(4, 6, False)[0]
    made = method.layer(weight, Metric(silent, 1e-6), form, None, torch.float16)
    torch.testing.assert_close(made.dense().double(), weight, rtol=1e-2, atol=1e-2)
