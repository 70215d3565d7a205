"""Sparse coding in float64: rows y ≈ c A with few nonzeros in c, atoms as rows of A."""

from collections.abc import Callable

import torch
from torch import Tensor

BATCH_BYTES = 2**28
SETTLED = 1e-3  # of the error, in one round


def largest(codes: Tensor, nonzeros: int) -> Tensor:
    """Keep the largest entries of each row, and set all others to zero."""
    chosen = codes.abs().topk(nonzeros, dim=1).indices
    return torch.zeros_like(codes).scatter_(1, chosen, codes.gather(1, chosen))


def orthonormal_dictionary(
    signals: Tensor, atoms: int, nonzeros: int, sweeps: int, history: list[float] | None = None
) -> tuple[Tensor, Tensor]:
    """Codes C and an A with A Aᵀ = I that make ‖Y − C A‖² small; it never rises.

    Both steps are exact: C is the largest entries of Y Aᵀ, and A = U Vᵀ from Cᵀ Y = U Σ Vᵀ. It
    starts as the first right singular vectors of Y, no worse than low rank ``nonzeros``.
    """
    found = torch.linalg.svd(signals, full_matrices=False).Vh[:atoms]
    codes = largest(signals @ found.mT, nonzeros)
    for _ in range(sweeps):
        left, _, right = torch.linalg.svd(codes.mT @ signals, full_matrices=False)
        found = left @ right
        codes = largest(signals @ found.mT, nonzeros)
        if history is not None:
            history.append(distance(signals, codes, found))
    return codes, found


def in_turns(
    signals: Tensor,
    atoms: int,
    nonzeros: int,
    sweeps: int,
    update: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Alternate between codes and atoms until an iteration gains nothing.

    ``update`` computes atoms from signals, codes (whose values it may change) and atoms. Codes come
    from matching pursuit. The initial atoms are rows.
    """
    found = first_atoms(signals, atoms)
    codes = matching_pursuit(signals, found, nonzeros)
    before = distance(signals, codes, found)
    for _ in range(sweeps):
        found = update(signals, codes, found)
        codes = recoded(signals, codes, found, nonzeros)
        now = distance(signals, codes, found)
        if before - now <= SETTLED * now:
            break
        before = now
    return codes, found


def matching_pursuit(signals: Tensor, atoms: Tensor, nonzeros: int) -> Tensor:
    """Orthogonal matching pursuit for all rows at once: codes (rows, atoms).

    A row takes the atom that has most to do with what is left of it, then all its coefficients are
    fitted anew. With G = A Aᵀ, the Cholesky factor of G_SS grows by a row with every atom, and q_t,
    a step of Gram-Schmidt seen from all atoms at once, brings the products with what is left up to
    date without a look at the rows:

        q_t = (G_i: − Σ_{j<t} q_j[i] q_j) / ‖·‖,   YAᵀ ← YAᵀ − a_t q_t
    """
    lengths = atoms.norm(dim=1)
    there = lengths > 1e-12 * lengths.max()
    lengths = torch.where(there, lengths, 1.0)
    units = atoms * (there / lengths).unsqueeze(1)
    gram = units @ units.mT
    batch = max(1, BATCH_BYTES // (8 * nonzeros * (len(atoms) + nonzeros)))
    found = [_pursuit(part @ units.mT, gram, nonzeros) for part in signals.split(batch)]
    return torch.cat(found) / lengths


def _pursuit(left: Tensor, gram: Tensor, nonzeros: int) -> Tensor:
    """Matching pursuit from Y Aᵀ and A Aᵀ with unit atoms."""
    rows, count = left.shape
    every = torch.arange(rows, device=left.device)
    floor = torch.finfo(gram.dtype).eps * count
    seen = left.new_zeros(rows, nonzeros, count)  # q_t
    chosen = torch.empty(rows, nonzeros, dtype=torch.long, device=left.device)
    parts = left.new_zeros(rows, nonzeros)  # a_t
    for step in range(nonzeros):
        best = left.abs().scatter_(1, chosen[:, :step], -1.0).argmax(1)
        chosen[:, step] = best
        before = seen[:, :step]
        new = gram[best] - torch.einsum("rt,rtk->rk", before[every, :, best], before)
        own = new[every, best]
        # An atom that those before it make up adds nothing, and may have rounding for a direction.
        sound = own > floor
        scale = sound / torch.where(sound, own, 1.0).sqrt()
        seen[:, step] = new.mul_(scale.unsqueeze(1))
        parts[:, step] = left[every, best] * scale
        left = left.addcmul(parts[:, step].unsqueeze(1), new, value=-1)
    factor = seen.gather(2, chosen.unsqueeze(1).expand(-1, nonzeros, -1)).mT.tril()
    diagonal = factor.diagonal(dim1=1, dim2=2)
    diagonal.copy_(torch.where(diagonal > 0, diagonal, 1.0))
    values = torch.linalg.solve_triangular(factor.mT, parts.unsqueeze(2), upper=True)
    return torch.zeros_like(left).scatter_(1, chosen, values.squeeze(2))


def recoded(signals: Tensor, codes: Tensor, atoms: Tensor, nonzeros: int) -> Tensor:
    """Codes by matching pursuit, except for rows whose current codes are better.

    Matching pursuit is greedy, so it can choose a worse set of better atoms.
    """
    new = matching_pursuit(signals, atoms, nonzeros)
    worse = errors(signals, new, atoms) > errors(signals, codes, atoms)
    return torch.where(worse.unsqueeze(1), codes, new)


def errors(signals: Tensor, codes: Tensor, atoms: Tensor) -> Tensor:
    """‖y − c A‖² of each row."""
    return (signals - codes @ atoms).square().sum(1)


def distance(signals: Tensor, codes: Tensor, atoms: Tensor) -> float:
    """‖Y − C A‖²."""
    return float(errors(signals, codes, atoms).sum())


def first_atoms(signals: Tensor, atoms: int) -> Tensor:
    """Initial unit atoms: random nonzero rows, then random directions; always the same.

    Draws are the same every time.
    """
    random = torch.Generator().manual_seed(0)
    sizes = signals.norm(dim=1)
    loud = (sizes > 1e-12 * sizes.max()).nonzero().squeeze(1)
    order = torch.randperm(len(loud), generator=random)[:atoms].to(loud.device)
    drawn = signals[loud[order]]
    shape = (atoms - len(drawn), signals.shape[1])
    more = torch.randn(shape, generator=random, dtype=torch.float64).to(signals)
    return torch.nn.functional.normalize(torch.cat((drawn, more)), dim=1)


def updated_atoms(signals: Tensor, codes: Tensor, atoms: Tensor, powers: int) -> Tensor:
    """One iteration of K-SVD over all atoms and their coefficients, in place; the error never
    increases.

    For an atom, with E what the rows that use it lack without it, a few power iterations from the
    atom as it is make it the first right singular vector of E; the coefficients are E a. An atom
    that no row uses becomes the row that is served worst. Gives the atoms.
    """
    residual = signals - codes @ atoms
    for index in range(len(atoms)):
        users = codes[:, index].nonzero().squeeze(1)
        if len(users) == 0:
            row = residual[residual.square().sum(1).argmax()]
            if bool(row.any()):
                atoms[index] = row / row.norm()
            continue
        lacking = residual[users] + codes[users, index].unsqueeze(1) * atoms[index]
        atom = atoms[index]
        for _ in range(powers):
            toward = (lacking @ atom) @ lacking
            if not bool(toward.any()):
                break
            atom = toward / toward.norm()
        share = lacking @ atom
        atoms[index], codes[users, index] = atom, share
        residual[users] = lacking - share.unsqueeze(1) * atom
    return atoms


def fitted_atoms(signals: Tensor, codes: Tensor, atoms: Tensor) -> Tensor:
    """Least-squares atoms for given codes; unused atoms stay as they are."""
    used = codes.any(0)
    found = atoms.clone()
    found[used] = torch.linalg.pinv(codes[:, used]) @ signals
    return found
