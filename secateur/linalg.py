"""Float64 kernels that methods share; row convention, y = x W, throughout.

C is a Gram of n channels (token mean of xᵀx), W (n, outputs) the consumer's weight, S a kept set.
The identity behind most of them: the least error of a linear consumer that sees only S is

    E(S) = min_Ŵ E‖xW − x_S Ŵ‖² = tr Wᵀ (C − C_:S C_SS⁻¹ C_S:) W,   Ŵ = C_SS⁻¹ C_S: W.
"""

import warnings

import torch
from torch import Tensor


class DampingWarning(UserWarning):
    """A ridge had to be raised for a matrix to be positive definite."""


def damped_cholesky(gram: Tensor, ridge: float, what: str) -> tuple[Tensor, float]:
    """Lower Cholesky factor of ``gram + ridge · mean(diag gram) · I`` and the ridge in use.

    The ridge is multiplied by ten, with a :class:`DampingWarning`, until the factor exists.

    Raises:
        ValueError: not even a ridge of 1 makes it positive definite, so it is no Gram.
    """
    scale = _scale(gram)
    eye, used = torch.eye(len(gram), dtype=gram.dtype, device=gram.device), ridge
    while used <= max(1.0, ridge):
        factor, failed = torch.linalg.cholesky_ex(gram + used * scale * eye)
        if not bool(failed):
            if used > ridge:
                warnings.warn(f"{what}: ridge raised from {ridge:g} to {used:g}", DampingWarning, 2)
            return factor, used
        used = max(10 * used, 1e-12)
    raise ValueError(f"{what}: not positive semidefinite")


def _scale(gram: Tensor) -> Tensor:
    """What ridges are relative to; never zero, so that silent channels can be damped too."""
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
    factor, _ = damped_cholesky(gram[order][:, order], ridge, what)
    rows = (factor.t() @ weight[order]).square().sum(1)
    return torch.cat((rows.flip(0).cumsum(0).flip(0), rows.new_zeros(1)))


def decoder(gram: Tensor, keep: Tensor, ridge: float, what: str = "refit") -> Tensor:
    """C_SS⁻¹ C_S:, which rebuilds all channels from the kept ones with least squared error.

    The ridge λ pulls towards the selection, (C_SS + λI)⁻¹ (C_S: + λ I_S:), not towards zero: a kept
    channel that calibration never saw active keeps its own row of the consumer.
    """
    kept = gram[keep][:, keep]
    factor, used = damped_cholesky(kept, ridge, what)
    target = gram[keep]
    target[torch.arange(len(keep)), keep] += used * _scale(kept)
    return torch.cholesky_solve(target, factor)


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
    """The best rank-k map for z ↦ zW in the metric C, for every k at once.

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
