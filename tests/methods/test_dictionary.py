"""Sparse codes in a dictionary: pursuit, both solvers' steps, planted atoms, what is stored."""

from itertools import combinations, pairwise

import pytest
import torch

from secateur import InputError
from secateur.layers.forms_secateur import FORMS, build, fill
from secateur.linalg.sparse_coding import (
    distance,
    errors,
    first_atoms,
    fitted_atoms,
    largest,
    matching_pursuit,
    orthonormal_dictionary,
    recoded,
    updated_atoms,
)
from secateur.methods import check_served
from secateur.methods.compot import COMPOT
from secateur.methods.cospadi import CoSpaDi
from secateur.methods.dictionary import stored
from secateur.methods.dsformer import DSFormer
from secateur.methods.form import Metric
from secateur.methods.svd_llm import SVDLLM
from secateur.structure.parametrizations import form_of

METHODS = pytest.mark.parametrize(
    "method", [COMPOT(ridge=0.0), CoSpaDi(ridge=0.0), DSFormer(ridge=0.0, blocks=2)],
    ids=lambda m: m.name,
)  # fmt: skip
SPECS = [
    {"form": "dictionary", "outputs": 9, "inputs": 6, "blocks": 1, "atoms": 5, "nonzeros": 3},
    {"form": "dictionary", "outputs": 40, "inputs": 6, "blocks": 2, "atoms": 33, "nonzeros": 2},
    {"form": "dictionary", "outputs": 300, "inputs": 4, "blocks": 1, "atoms": 300, "nonzeros": 4},
    {"form": "dictionary", "outputs": 9, "inputs": 4, "blocks": 2, "atoms": 8, "nonzeros": 1},
]
EVERY = pytest.mark.parametrize("spec", SPECS, ids=lambda s: "-".join(map(str, s.values())))


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def unit(rows):
    return torch.nn.functional.normalize(rows, dim=1)


def metric(seed, inputs, ridge=0.0):
    x = normal(seed, 6 * inputs, inputs) @ normal(seed + 1, inputs, inputs)
    x = x * (0.1 + normal(seed + 2, inputs).abs())
    return Metric(x.mT @ x / len(x), ridge)


def sparse(seed, rows, atoms, nonzeros):
    """Codes with as many non-zeros in every row, none of them small."""
    values = normal(seed, rows, atoms)
    values = values.sign() * (0.5 + values.abs())
    order = torch.rand(rows, atoms, generator=torch.Generator().manual_seed(seed + 1))
    chosen = order.topk(nonzeros, dim=1).indices
    return torch.zeros(rows, atoms).double().scatter_(1, chosen, values.gather(1, chosen))


def layer_of(spec, tensors, bias=None):
    return fill({**spec, "bias": bias is not None}, tensors, bias, torch.float64).eval()


def tensors_of(spec):
    blocks, outputs, atoms = spec["blocks"], spec["outputs"], spec["atoms"]
    codes = sparse(0, blocks * outputs, atoms, spec["nonzeros"]).view(blocks, outputs, atoms)
    basis = normal(2, blocks, atoms, spec["inputs"] // blocks)
    return codes, basis, stored(spec, codes, basis)


def dense_of(method, weight, within, atoms, nonzeros):
    spec = {"form": "dictionary", "outputs": len(weight), "inputs": weight.shape[1], "bias": False}
    spec |= {"blocks": method.parts, "atoms": atoms, "nonzeros": nonzeros}
    return layer_of(spec, method.reshaped(weight, within, form_of(spec, ""))).dense()


# --- the form ---


@EVERY
def test_a_layer_is_codes_times_atoms_block_by_block(spec):
    codes, basis, tensors = tensors_of(spec)
    layer = layer_of(spec, tensors, normal(9, spec["outputs"]))
    weight = torch.cat([c @ a for c, a in zip(codes, basis, strict=True)], 1)
    torch.testing.assert_close(layer.dense(), weight)
    x = normal(10, 2, 3, spec["inputs"])
    torch.testing.assert_close(layer(x), x @ weight.mT + layer.bias)
    assert torch.equal(layer.chosen(), codes != 0)


@EVERY
def test_a_form_costs_what_is_stored_and_takes_the_smaller_kind_of_index(spec):
    *_, tensors = tensors_of(spec)
    layer = layer_of(spec, tensors).to(torch.float16)
    state, priced = layer.state_dict(), form_of({**spec, "bias": False}, "")
    assert sum(t.nbytes for t in state.values()) == priced.bytes(2)
    rows = spec["blocks"] * spec["outputs"]
    as_mask = rows * -(-spec["atoms"] // 8)
    as_indices = rows * spec["nonzeros"] * (1 if spec["atoms"] <= 256 else 2)
    assert priced.packed == min(as_mask, as_indices)
    assert {"mask", "indices"} & set(state) == {"indices" if as_indices < as_mask else "mask"}
    other = build(layer.spec).to(torch.float16)
    other.load_state_dict(state)
    assert torch.equal(other.dense(), layer.dense())


def test_indices_above_a_byte_come_back():
    spec = SPECS[2]
    *_, tensors = tensors_of(spec)
    assert tensors["indices"].dtype == torch.int16
    assert tensors["indices"].max() > 255
    assert FORMS["dictionary"].tensors({**spec, "atoms": 256})["indices"][1] == torch.uint8


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[1]], ids=["mask", "indices"])
def test_a_support_that_is_none_is_refused(spec):
    *_, tensors = tensors_of(spec)
    broken = {name: t.clone() for name, t in tensors.items()}
    if "mask" in broken:
        broken["mask"][0, 0, 0] ^= 1 << 7  # an atom that there isn't
    else:
        broken["indices"][0, 0, 0] = broken["indices"][0, 0, 1]  # one of them twice
    for wrong in (broken, {**tensors, **_other_count(tensors)}):
        with pytest.raises(ValueError, match="a row doesn't have"):
            layer_of(spec, wrong).dense()


def _other_count(tensors):
    """A row with an atom too many and another with one too few; or an atom that there isn't."""
    if "indices" in tensors:
        return {"indices": tensors["indices"].clone().fill_(200)}
    mask = tensors["mask"].clone()
    free = next(i for i in range(5) if not mask[0, 0, 0] >> i & 1)
    used = next(i for i in range(5) if mask[0, 1, 0] >> i & 1)
    mask[0, 0, 0] |= 1 << free
    mask[0, 1, 0] ^= 1 << used
    return {"mask": mask}


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"blocks": 4, "atoms": 2, "nonzeros": 1}, "divide the inputs"),
        ({"blocks": 1, "atoms": 13, "nonzeros": 1}, "atoms should be at most 12"),
        ({"blocks": 2, "atoms": 2, "nonzeros": 3}, "nonzeros should be at most 2"),
        ({"blocks": 3, "atoms": 8, "nonzeros": 3}, "nonzeros should be at most 2"),
    ],
)
def test_what_cannot_be_is_refused(numbers, message):
    spec = {"form": "dictionary", "outputs": 12, "inputs": 6, "bias": False, **numbers}
    with pytest.raises(ValueError, match=message):
        build(spec)


# --- matching pursuit ---


def by_the_book(row, atoms, nonzeros):
    """Matching pursuit of one row, every fit by least squares."""
    chosen, left = [], row
    for _ in range(nonzeros):
        products = (atoms @ left).abs() / atoms.norm(dim=1)
        products[chosen] = -1.0
        chosen.append(int(products.argmax()))
        fit = torch.linalg.lstsq(atoms[chosen].mT, row.unsqueeze(1)).solution.squeeze(1)
        left = row - fit @ atoms[chosen]
    code = torch.zeros(len(atoms)).double()
    code[chosen] = fit
    return code


@pytest.mark.parametrize(("atoms", "nonzeros"), [(8, 3), (12, 5), (4, 4), (30, 1)])
def test_all_rows_at_once_are_each_as_by_the_book(atoms, nonzeros, monkeypatch):
    signals, basis = normal(0, 17, 6), normal(1, atoms, 6)  # atoms of any length
    expected = torch.stack([by_the_book(row, basis, nonzeros) for row in signals])
    torch.testing.assert_close(matching_pursuit(signals, basis, nonzeros), expected)
    monkeypatch.setattr("secateur.linalg.sparse_coding.BATCH_BYTES", 1000)
    torch.testing.assert_close(matching_pursuit(signals, basis, nonzeros), expected)


def exhaustive(signals, atoms, nonzeros):
    best = torch.full((len(signals),), torch.inf).double()
    for chosen in combinations(range(len(atoms)), nonzeros):
        basis = torch.linalg.qr(atoms[list(chosen)].mT).Q
        left = (signals - signals @ basis @ basis.mT).square().sum(1)
        best = torch.minimum(best, left)
    return best


@pytest.mark.parametrize(("atoms", "nonzeros"), [(8, 1), (8, 2), (8, 3), (5, 3)])
def test_pursuit_is_seldom_far_from_the_best_support_and_never_beyond(atoms, nonzeros):
    signals, basis = normal(3, 200, 12), unit(normal(4, atoms, 12))
    found = errors(signals, matching_pursuit(signals, basis, nonzeros), basis)
    best = exhaustive(signals, basis, nonzeros)
    assert (found >= best * (1 - 1e-12)).all()
    assert (found <= best * (1 + 1e-9)).double().mean() > (0.999 if nonzeros == 1 else 0.6)
    basis = torch.linalg.qr(normal(5, 12, atoms)).Q.mT  # at right angles it is the best
    exact = sparse(6, 100, atoms, nonzeros)
    torch.testing.assert_close(matching_pursuit(exact @ basis, basis, nonzeros), exact)


def test_every_atom_is_least_squares_and_more_atoms_than_inputs_fit_exactly():
    signals = normal(0, 20, 9)
    basis = normal(1, 5, 9)
    code = matching_pursuit(signals, basis, 5)
    torch.testing.assert_close(code, torch.linalg.lstsq(basis.mT, signals.mT).solution.mT)
    over = unit(normal(2, 14, 9))
    assert distance(signals, matching_pursuit(signals, over, 9), over) < 1e-18


def test_atoms_that_are_one_another_and_rows_of_nothing_do_no_harm():
    basis = normal(1, 3, 6).repeat(3, 1)  # nine atoms in three directions
    basis = torch.cat((basis, torch.zeros(2, 6).double()))
    signals = torch.cat((normal(2, 4, 3) @ basis[:3], torch.zeros(2, 6).double()))
    code = matching_pursuit(signals, basis, 7)
    assert code.isfinite().all()
    assert distance(signals, code, basis) < 1e-20
    assert (code[4:] == 0).all()


# --- the steps of the solvers ---


def test_pursuit_alone_makes_some_rows_worse_and_keeping_the_best_none():
    signals = normal(0, 96, 32)
    basis = first_atoms(signals, 48)
    code, worse = matching_pursuit(signals, basis, 12), 0
    losses = [distance(signals, code, basis)]
    for _ in range(8):
        updated_atoms(signals, code, basis, 3)
        losses.append(distance(signals, code, basis))
        plain = errors(signals, matching_pursuit(signals, basis, 12), basis)
        before = errors(signals, code, basis)
        worse += int((plain > before * (1 + 1e-9)).sum())
        code = recoded(signals, code, basis, 12)
        after = errors(signals, code, basis)
        assert (after <= before * (1 + 1e-9)).all()
        assert ((code != 0).sum(1) <= 12).all()
        losses.append(float(after.sum()))
    assert worse > 50
    for before, after in pairwise(losses):
        assert after <= before * (1 + 1e-12)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("powers", [1, 3, 200])
def test_an_atom_becomes_the_best_for_the_rows_that_use_it(powers):
    signals, code = normal(0, 20, 7), sparse(1, 20, 4, 2)
    basis = unit(normal(2, 4, 7))
    users = code[:, 0] != 0
    lacking = signals[users] - code[users][:, 1:] @ basis[1:]
    best = torch.linalg.svdvals(lacking)[1:].square().sum()
    only = signals - code[:, 1:] @ basis[1:]  # what the first atom alone has to say
    first_code, first_atom = code[:, :1].clone(), basis[:1].clone()
    before = distance(only, first_code, first_atom)
    updated_atoms(only, first_code, first_atom, powers)
    after = errors(only, first_code, first_atom)
    assert float(after.sum()) <= before
    assert ((first_code == 0) == (code[:, :1] == 0)).all()
    if powers == 200:
        assert float(after[users].sum()) == pytest.approx(float(best))


def test_an_atom_without_rows_takes_up_the_row_that_is_served_worst():
    signals, code = normal(0, 20, 7), sparse(1, 20, 4, 2)
    code[:, 3] = 0.0
    basis = unit(normal(2, 4, 7))
    before = distance(signals, code, basis)
    updated_atoms(signals, code, basis, 2)
    assert distance(signals, code, basis) <= before
    assert basis[3].norm() == pytest.approx(1.0)


def test_fitted_atoms_are_least_squares():
    signals, code, basis = normal(0, 20, 7), sparse(1, 20, 5, 2), normal(2, 5, 7)
    code[:, 4] = 0.0
    found = fitted_atoms(signals, code, basis)
    torch.testing.assert_close(code.mT @ (signals - code @ found), torch.zeros(5, 7).double())
    assert torch.equal(found[4], basis[4])


def test_turns_with_an_orthonormal_dictionary_never_rise_by_themselves():
    signals, losses = normal(0, 60, 24), []
    code, basis = orthonormal_dictionary(signals, 16, 8, 30, losses)
    torch.testing.assert_close(basis @ basis.mT, torch.eye(16).double())
    assert losses[-1] == distance(signals, code, basis)
    for before, after in pairwise(losses):
        assert after <= before * (1 + 1e-12)
    low = torch.linalg.svdvals(signals)[8:].square().sum()
    assert losses[0] < low  # it starts as low rank 8 with a choice
    assert losses[-1] < 0.97 * losses[0]
    products = signals @ basis.mT
    torch.testing.assert_close(code, largest(products, 8))
    torch.testing.assert_close(code[code != 0], products[code != 0])


def test_no_other_turn_of_the_dictionary_is_better_for_its_codes():
    signals = normal(0, 30, 6)
    code, _ = orthonormal_dictionary(signals, 4, 2, 3)
    left, _, right = torch.linalg.svd(code.mT @ signals, full_matrices=False)
    best = distance(signals, code, left @ right)
    for seed in range(200):
        other = torch.linalg.qr((left @ right + 0.3 * normal(seed, 4, 6)).mT).Q.mT
        assert distance(signals, code, other) >= best
        assert distance(signals, code, -other) >= best


# --- the methods ---


@METHODS
@pytest.mark.parametrize("whitened", [False, True])
def test_as_many_nonzeros_as_inputs_is_the_weight_itself(method, whitened):
    weight = normal(5, 14, 8)
    within = metric(6, 8) if whitened else Metric.identity(8, weight)
    width = 8 // method.parts
    found = dense_of(method, weight, within, width, width)
    torch.testing.assert_close(found, weight)


def test_every_atom_in_every_row_is_low_rank_in_the_metric_of_inputs():
    weight, within = normal(5, 20, 12), metric(6, 12)
    for method in (COMPOT(ridge=0.0), CoSpaDi(ridge=0.0, sweeps=60, powers=20)):
        lost = within.error(weight - dense_of(method, weight, within, 5, 5))
        root = torch.linalg.cholesky(within.gram)
        expected = torch.linalg.svdvals(weight @ root)[5:].square().sum()
        slack = 0.05 if method.name == "cospadi" else 1e-9  # it stops where a round gains little
        assert lost == pytest.approx(float(expected), rel=slack)


def test_a_planted_orthonormal_dictionary_is_found():
    within = metric(6, 16)
    inverse = within.whitening[1]
    basis = torch.linalg.qr(normal(1, 16, 16)).Q
    weight = sparse(2, 200, 16, 2) @ basis @ inverse
    found = dense_of(COMPOT(ridge=0.0, sweeps=200), weight, within, 16, 2)
    assert within.error(weight - found) < 1e-12 * within.error(weight)


def test_a_planted_dictionary_is_found():
    """All of it from near; from rows of the weight most of it, as K-SVD may be caught."""
    hadamard = torch.ones(1, 1).double()
    for _ in range(4):
        hadamard = torch.kron(hadamard, torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double())
    # No two atoms are nearer than by 1/4, so that pursuit finds all pairs of them.
    basis = torch.cat((torch.eye(16).double()[:12], hadamard[2:14] / 4))
    signals = sparse(2, 600, 24, 2) @ basis
    near = unit(basis + 0.1 * normal(3, 24, 16))
    found = matching_pursuit(signals, near, 2)
    for _ in range(30):
        updated_atoms(signals, found, near, 3)
        found = recoded(signals, found, near, 2)
    assert distance(signals, found, near) < 1e-12 * signals.square().sum()
    torch.testing.assert_close((near @ basis.mT).abs().diagonal(), torch.ones(24).double())

    within = metric(6, 16)
    inverse = within.whitening[1]
    weight = signals @ inverse
    spec = {"form": "dictionary", "outputs": 600, "inputs": 16, "bias": False}
    form = form_of({**spec, "blocks": 1, "atoms": 24, "nonzeros": 2}, "")
    tensors = CoSpaDi(ridge=0.0, sweeps=60).reshaped(weight, within, form)
    atoms = unit(tensors["first"][0] @ within.whitening[0])
    assert ((atoms @ basis.mT).abs().amax(0) > 0.99).double().mean() > 0.8


def subspaces(seed, dimension, inputs):
    """Rows from six subspaces: of full rank together."""
    bases = normal(seed, 6, dimension, inputs)
    return torch.cat([normal(seed + 1 + i, 32, dimension) @ b for i, b in enumerate(bases)])


@METHODS
def test_on_rows_from_several_subspaces_it_loses_less_than_low_rank_of_the_bytes(method):
    if method.parts == 1:
        within = metric(6, 24, ridge=1e-9)
        weight = subspaces(0, 3, 24) @ within.whitening[1]
    else:  # blocks cut subspaces up, if they aren't their own
        weight = torch.cat([subspaces(seed, 2, 12) for seed in (0, 20)], 1)
        within = Metric.identity(24, weight)
    own = next(f for f in method.forms(192, 24, False)[::-1] if f.bytes(2) < 192 * 24)
    low = SVDLLM(rank_step=1)
    rank = next(f for f in low.forms(192, 24, False) if f.bytes(2) >= own.bytes(2))
    lost = method.errors(weight, within, [own])[0]
    assert lost < 0.8 * low.errors(weight, within, [rank])[0]


def test_blocks_make_good_what_those_before_them_lost():
    weight, within = normal(5, 40, 16), metric(6, 16)
    method = DSFormer(ridge=0.0)
    apart = Metric(torch.block_diag(*(within.gram[i : i + 4, i : i + 4] for i in range(0, 16, 4))))
    lost = within.error(weight - dense_of(method, weight, within, 4, 2))
    alone = within.error(weight - dense_of(method, weight, apart, 4, 2))
    assert lost < 0.9 * alone


@METHODS
def test_sizes_are_even_in_bytes_and_hold_to_the_ratio(method):
    forms = method.forms(512, 256, True)
    shares = [form.bytes(2) / (512 * 256 * 2) for form in forms]
    assert shares == pytest.approx([i / 8 for i in range(1, 8)], abs=0.02)
    for level, (form, share) in enumerate(zip(forms, shares, strict=True), 1):
        spec = form.spec
        assert spec["nonzeros"] == max(1, spec["atoms"] // 2)
        assert share <= level / 8


@METHODS
def test_silent_inputs_do_no_harm(method):
    weight, within = normal(5, 24, 8), metric(6, 8, ridge=1e-6)
    within.gram[:, 4:] = 0.0
    within.gram[4:] = 0.0
    for form in method.forms(24, 8, False):
        tensors = method.reshaped(weight, within, form)
        assert all(bool(t.float().isfinite().all()) for t in tensors.values())
        again = method.reshaped(weight, within, form)
        assert all(torch.equal(t, again[name]) for name, t in tensors.items())


def test_blocks_that_divide_no_inputs_are_refused(opened):
    with pytest.raises(InputError, match=r"13 blocks don't divide the inputs .*try --blocks"):
        check_served(DSFormer(blocks=13), opened("llama"))
