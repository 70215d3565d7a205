"""Symmetric products by bands of rows, against the plain product in float64."""

import pytest
import torch

from secateur import Store
from secateur.calibration.needs import Needs
from secateur.calibration.statistics import Gram
from secateur.linalg.symmetric import BAND, add_product, kept, mirrored
from tests.support.raw import normal


def whole(rows):
    return rows.double().t() @ rows.double()


@pytest.mark.parametrize("size", [1, BAND - 1, BAND, BAND + 1, 2 * BAND + 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_product_is_whole_again_once_it_is_mirrored(size, dtype):
    """The mistake: the triangle below the diagonal copied over the one above it."""
    rows = normal(0, 40, size).to(dtype)
    total = torch.zeros(size, size, dtype=torch.float64)
    total = add_product(add_product(total, rows, rows), rows, rows, -3)
    found, expected = mirrored(total), -2 * whole(rows)
    exact = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found, expected, atol=exact * float(expected.abs().max()), rtol=0)
    assert torch.equal(found, found.t())


def test_two_factors_whose_product_is_symmetric():
    p, m = normal(0, 5, BAND + 9), normal(1, 5, BAND + 9)
    given = torch.cat((p, m)), torch.cat((m, p))
    found = mirrored(add_product(torch.zeros(BAND + 9, BAND + 9, dtype=p.dtype), *given))
    torch.testing.assert_close(found, p.t() @ m + m.t() @ p)


@pytest.mark.parametrize("size", [0, 1, 7, 3 * BAND // 2, 2 * BAND, 2 * BAND + 5])
def test_what_stays_moves_to_the_front(size):
    """From above the diagonal alone, some of it across bands."""
    full = whole(normal(0, 30, 2 * BAND + 5))
    stays = torch.randperm(len(full), generator=torch.Generator().manual_seed(1))[:size]
    stays = stays.sort().values
    above = full.triu().masked_fill(full.tril(-1) != 0, torch.nan)
    found = kept(above, stays)
    assert torch.equal(found.triu().nan_to_num(), full[stays][:, stays].triu())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_gram_of_several_bands_counts_real_tokens_alone(dtype):
    """Merged, moved and read, whether all tokens of a batch are real or only some."""
    values = normal(0, 4, 30, BAND + 70).to(dtype)
    mask = torch.ones(4, 30, dtype=torch.bool)
    mask[3, 20:] = False
    first, second = Gram(), Gram()
    first.update(values[:1], mask=mask[:1])
    first.update(values[1:2], mask=mask[1:2])
    second.update(values[2:], mask=mask[2:])
    first.merge(second)
    assert first.tokens == 110
    expected = whole(values[mask]) / 110
    exact = 1e-13 if dtype == torch.float64 else 1e-6
    largest = float(expected.abs().max())
    torch.testing.assert_close(first.mean, expected, atol=exact * largest, rtol=0)
    assert torch.equal(first.mean, first.mean.t())
    again = Gram(first.total.clone(), first.tokens)  # as from a file
    assert torch.equal(again.mean, first.mean)


@pytest.mark.parametrize("size", [0, 5, BAND, BAND + 70])
def test_a_file_holds_half_of_a_gram_and_gives_all_of_it(size, tmp_path):
    needs = Needs.HIDDEN_GRAM, Needs.MIXED_GRAM, Needs.HIDDEN_ENERGY
    own = {need: need.kind() for need in needs}
    mask = torch.ones(1, 20, dtype=torch.bool)
    for seed, statistic in enumerate(own.values()):
        statistic.update(normal(seed, 1, 20, size), mask=mask)
    Store(tmp_path).put(3, own)
    again = Store(tmp_path).get(3, needs[1:])
    assert list(again) == list(needs[1:])
    for need, statistic in again.items():
        assert torch.equal(statistic.mean, own[need].mean)
    written = (tmp_path / "block-00003.safetensors").stat().st_size
    assert size <= BAND or written < 2 * 8 * 0.95 * size**2


def test_sums_over_batches_are_in_float64():
    """The mistake: a small batch behind a large one leaves no trace in a float32 sum."""
    ones = torch.ones(1, 1, 3)
    mask, gram = torch.ones(1, 1, dtype=torch.bool), Gram()
    gram.update(1e5 * ones, mask=mask)
    gram.update(ones, mask=mask)
    assert torch.equal(2 * gram.mean, torch.full((3, 3), 1e10 + 1, dtype=torch.float64))
