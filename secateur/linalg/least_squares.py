"""Float64 kernels that methods share; row convention, y = x W, throughout.

C is a Gram of n channels (token mean of xᵀx), W (n, outputs) the consumer's weight, S a kept set.
The identity behind most of them: the least error of a linear consumer that sees only S is

    E(S) = min_Ŵ E‖xW − x_S Ŵ‖² = tr Wᵀ (C − C_:S C_SS⁻¹ C_S:) W,   Ŵ = C_SS⁻¹ C_S: W.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from secateur.utils.errors import InputError
from secateur.utils.precision import exact


class DampingWarning(UserWarning):
    """A ridge was increased so that a matrix is positive definite."""


def damped_cholesky(
    gram: Tensor, ridge: float, what: str, spare: bool = False
) -> tuple[Tensor, float]:
    """Lower Cholesky factor of ``gram + ridge · mean(diag gram) · I`` and the ridge in use.

    The ridge is multiplied by ten, with a :class:`DampingWarning`, until the factor exists. A
    ``spare`` matrix is needed no more behind this, which then takes no copy of it.

    Raises:
        InputError: not even a ridge of 1 makes it positive definite, so it is no Gram.
    """
    raised, used = gram if spare else gram.clone(), ridge
    diagonal, scale = gram.diagonal().clone(), _scale(gram)
    while used <= max(1.0, ridge):
        raised.diagonal().copy_(diagonal + used * scale)
        factor, failed = torch.linalg.cholesky_ex(raised)
        if not bool(failed):
            if used > ridge:
                warnings.warn(f"{what}: ridge raised from {ridge:g} to {used:g}", DampingWarning, 2)
            return factor, used
        used = max(10 * used, 1e-12)
    raise InputError(
        f"{what}: not positive semidefinite; try --dtype float32, more text or larger ridges."
    )


def damped(gram: Tensor, ridge: float) -> Tensor:
    """``gram + ridge · mean(diag gram) · I``."""
    raised = gram.clone()
    raised.diagonal().add_(ridge * _scale(gram))
    return raised


def _scale(gram: Tensor) -> Tensor:
    """The value that ridges are relative to; never zero, so that inactive channels can be
    damped.
    """
    return gram.diagonal().mean().clamp_min(1e-200)


def ridge_leverage(gram: Tensor, ridge: float, what: str = "ridge leverage") -> Tensor:
    """Ridge leverage of each channel, diag(C (C + λI)⁻¹) with λ = ridge · mean(diag C).

    A small ridge ranks by what the other channels cannot explain, a large one by energy. As
    C (C + λI)⁻¹ = I − λ (C + λI)⁻¹, one Cholesky factor is enough.
    """
    factor, used = damped_cholesky(gram, ridge, what)
    return 1 - used * _scale(gram) * torch.cholesky_inverse(factor).diagonal()


def nested_errors(
    gram: Tensor, weight: Tensor, order: Tensor, ridge: float, what: str = "error curve"
) -> Tensor:
    """E(S) for S = the first k channels of ``order``, k = 0 … n, from one factorisation.

    With C = LLᵀ in that order, C − C_:S C_SS⁻¹ C_S: = L_:R L_:Rᵀ for the removed R, so E(S) is the
    tail sum of the squared rows of LᵀW.
    """
    factor, _ = damped_cholesky(reordered(gram, order), ridge, what, spare=True)
    rows = (factor.t() @ weight[order]).square().sum(1)
    return tails(rows)


def refit_errors(
    gram: Tensor, weight: Tensor, order: Tensor, ridge: float, what: str = "error curve"
) -> Tensor:
    """E‖xW − x_S Ŵ‖² for S = the first k channels of ``order``, k = 0 … n, where a ridge refits.

    Ŵ minimises E‖xW − x_S Ŵ‖² + λ‖W − Ŵ‖², so it is no plain least squares fit. With H = C + λI =
    LLᵀ in that order, taking out channel i changes the weight by −n_i aᵢᵀ, n_i a column of L⁻ᵀ and
    aᵢ a row of LᵀW, whatever went before. So the changes add up, H weighs them as Σ ‖aᵢ‖², and

        E(k) = Σ_{i ≥ k} ‖aᵢ‖² − λ Σ_{i, j ≥ k} ⟨n_i, n_j⟩ ⟨aᵢ, a_j⟩
    """
    factor, used = damped_cholesky(reordered(gram, order), ridge, what, spare=True)
    rows = factor.t() @ weight[order]
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
    inner = (inverse @ inverse.t()) * (rows @ rows.t())
    changed = 2 * inner.triu().sum(1) - inner.diagonal()
    errors = tails(rows.square().sum(1)) - used * _scale(gram) * tails(changed)
    return errors.clamp_min(0).flip(0).cummax(0).values.flip(0)  # falls, whatever rounding does


def reordered(gram: Tensor, order: Tensor) -> Tensor:
    """Rows and columns in another order, or some of them, without an intermediate copy."""
    return gram[order.unsqueeze(1), order]


def tails(parts: Tensor) -> Tensor:
    """Sum of the parts after the first k of n, for k = 0 … n."""
    return torch.cat((parts.flip(0).cumsum(0).flip(0), parts.new_zeros(1)))


def decoder(gram: Tensor, keep: Tensor, ridge: float, what: str = "refit") -> Tensor:
    """C_SS⁻¹ C_S:, which reconstructs all channels from the kept ones with the least squared error.

    The ridge λ pulls towards the selection, (C_SS + λI)⁻¹ (C_S: + λ I_S:), not towards zero: a kept
    channel that calibration never saw active keeps its own row of the consumer.
    """
    kept = gram[keep][:, keep]
    factor, used = damped_cholesky(kept, ridge, what)
    target = gram[keep]
    target[torch.arange(len(keep)), keep] += used * _scale(kept)
    return torch.cholesky_solve(target, factor)


def energies(weight: Tensor) -> Tensor:
    """Squared singular values of a matrix, ascending; values below rounding error become zero."""
    weight = weight.double()
    gram = weight @ weight.mT if weight.shape[0] < weight.shape[1] else weight.mT @ weight
    found: Tensor = torch.linalg.eigvalsh(gram)
    floor = torch.finfo(gram.dtype).eps * len(gram) * found[-1:]
    return torch.where(found > floor, found, 0.0)


def roots(gram: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Symmetric C^½ and C^-½ of (a batch of) Grams whose eigenvalues are raised by the ridge.

    The ridge is relative to the mean of the diagonal. Directions without energy, which only a
    ridge of zero leaves, have none in either root (pseudo-inverse).
    """
    values, vectors = torch.linalg.eigh(gram)
    scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    values = values.clamp_min(0) + ridge * scale
    floor = torch.finfo(gram.dtype).eps * gram.shape[-1] * values.amax(-1, keepdim=True)
    there = (values > floor).to(values.dtype).unsqueeze(-2)
    root = values.sqrt().unsqueeze(-2) * there
    inverse = there / torch.where(there > 0, root, 1.0)
    return (vectors * root) @ vectors.mT, (vectors * inverse) @ vectors.mT


def low_rank_in_metric(gram: Tensor, weight: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """Best approximation of z ↦ zW of rank k in the metric C, for all k at once.

    Returns encode E (n, n), decode D (n, n) and the discarded energies (n): for each k, E[:, :k]
    D[:k] is the projection P that minimises E‖zW − zPW‖², and the error is the sum of the energies
    from k on (Eckart-Young on C^½ W). Batched over leading dimensions.
    """
    root, inverse = roots(gram, ridge)
    whitened = root @ weight
    # The left singular vectors are the eigenvectors of a matrix no wider than a head.
    energies, left = torch.linalg.eigh(whitened @ whitened.mT)
    energies, left = energies.flip(-1).clamp_min(0), left.flip(-1)
    return inverse @ left, left.mT @ root, energies


def least_squares(
    gram: Tensor,
    cross: Tensor,
    prior: Tensor,
    ridge: float,
    what: str = "refit",
    spare: bool = False,
) -> Tensor:
    """The Ŵ (k, outputs) that minimises E‖t − xŴ‖² + λ‖Ŵ − prior‖², from C = E xᵀx and E xᵀt.

    λ is ``ridge`` times the mean of diag C, so the ridge pulls to the prior and not to zero. A
    ``spare`` Gram is needed no more behind this, which then takes no copy of it.
    """
    if len(gram) == 0:
        return prior.clone()
    scale = _scale(gram)
    factor, used = damped_cholesky(gram, ridge, what, spare)
    return torch.cholesky_solve(cross + used * scale * prior, factor)


def conjugate_gradients(
    curved: Callable[[list[Tensor]], list[Tensor]],
    preconditioned: Callable[[list[Tensor]], list[Tensor]],
    residual: list[Tensor],
    iterations: int,
    agreed: Callable[[float], float] = float,
) -> list[Tensor]:
    """Solve ``curved(x) = residual`` approximately; stops early if the solution is exact.

    Processes that solve together pass ``agreed``, which gives all of them the number of one: they
    round differently on different machines, and one that stops alone would leave the others
    waiting.
    """
    found = [torch.zeros_like(r) for r in residual]
    direction = toward = preconditioned(residual)
    size = agreed(_dot(residual, toward))
    for _ in range(iterations):
        bent = curved(direction)
        curvature = agreed(_dot(direction, bent))
        if not (size > 0 and curvature > 0):
            break
        length = size / curvature
        found = [x + length * d for x, d in zip(found, direction, strict=True)]
        residual = [r - length * b for r, b in zip(residual, bent, strict=True)]
        toward, before = preconditioned(residual), size
        size = agreed(_dot(residual, toward))
        direction = [t + size / before * d for t, d in zip(toward, direction, strict=True)]
    return found


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    return sum(float((exact(x) * exact(y)).sum()) for x, y in zip(a, b, strict=True))
