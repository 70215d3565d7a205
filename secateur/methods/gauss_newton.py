"""The linears before an activation, refitted to what the MLP's output should be."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.block import Block
from secateur.linalg import conjugate_gradients, damped_cholesky, least_squares
from secateur.statistics import Cross, Gram

TOKENS = 4096  # at a time
REMEMBERED = 4 * 2**30  # bytes of slopes that are kept between iterations
Parts = list[Tensor]


@dataclass(frozen=True)
class GaussNewton:
    """One Gauss-Newton step on gate and up of a narrowed MLP, then its consumer once more.

    With n the MLP's inputs, t what its output should be, p_i = n P_i the producers' outputs, h the
    channels made of them one by one and D_i = ∂h/∂p_i, the change X of the P_i minimises the
    linearised error, pulled to no change by a ridge:

        E‖t − h Ŵ − Σ_i (D_i ∘ n X_i) Ŵ‖² + ridge Σ_i Σ_s c_is X_isᵀ C X_is
        c_is = ‖Ŵ_s‖² E D_is²,   C = E nᵀn

    by conjugate gradients, preconditioned by c ⊗ C (exact if slopes and inputs were independent
    and channels orthogonal). A few iterations are enough; more fit the calibration text. The step
    is halved until the true error falls on tokens that had no part in it, or dropped. Don't use it
    with fewer tokens than the MLP has inputs and channels; below a few hundred nothing is left to
    judge by, and nothing changes.

    Source: own; Gauss-Newton with conjugate gradients as in Martens' Hessian-free optimisation.

    Attributes:
        iterations: of conjugate gradients.
        ridge: of the change, and of C.
        refit_ridge: of the consumer's least squares.
    """

    iterations: int
    ridge: float
    refit_ridge: float

    def refine(self, block: Block, inputs: Tensor, targets: Tensor) -> None:
        """Change the producers of ``block`` and then its consumer, in place.

        ``inputs`` (tokens, hidden) and ``targets`` (tokens, outputs), the latter without bias.
        """
        # Every seventh run of 32 tokens judges: at all positions of windows of powers of two.
        rows = torch.arange(len(inputs), device=inputs.device) // 32 % 7
        fit, judge = rows != 6, rows == 6
        step = self._step(block, inputs[fit], targets[fit])
        before, weights = self._error(block, inputs[judge], targets[judge]), block.producer_weights
        originals = [weight.clone() for weight in weights]
        for scale in (1.0, 0.5, 0.25):
            for weight, original, change in zip(weights, originals, step, strict=True):
                weight.data.copy_(original + scale * change)
            if self._error(block, inputs[judge], targets[judge]) < before:
                self._refit(block, inputs, targets)
                return
        for weight, original in zip(weights, originals, strict=True):
            weight.data.copy_(original)

    def _step(self, block: Block, inputs: Tensor, targets: Tensor) -> Parts:
        """The change of every part, (inputs, channels), float32."""
        consumer = block.consumer_weight.float()
        count = len(inputs)
        cached: dict[int, Parts] = {}
        room = REMEMBERED // (4 * consumer.shape[0] * len(block.producer_weights) * TOKENS)

        def pieces() -> Iterator[tuple[int, Tensor, Parts]]:
            for start in range(0, count, TOKENS):
                piece = inputs[start : start + TOKENS]
                slopes = cached.get(start) or self._slopes(block, piece)
                if len(cached) < room:
                    cached[start] = slopes
                yield start, piece.float(), slopes

        def back(errors: Tensor, piece: Tensor, slopes: Parts) -> Parts:
            """The gradient of ½‖errors‖² by every part."""
            hidden = errors @ consumer.t()
            return [piece.t() @ (slope * hidden) / count for slope in slopes]

        gram = Gram()
        residual: Parts = []
        energy: Parts = []
        for start, piece, slopes in pieces():
            found = block.channels(block.produced(inputs[start : start + TOKENS])).float()
            errors = targets[start : start + TOKENS].float() - found @ consumer
            residual = _sum(residual, back(errors, piece, slopes))
            energy = _sum(energy, [slope.square().sum(0) / count for slope in slopes])
            gram.update(piece, mask=torch.ones(len(piece), dtype=torch.bool, device=piece.device))
        channel = consumer.square().sum(1)
        scale = [channel * e for e in energy]
        scale = [s.clamp_min(1e-12 * float(s.max()) + 1e-30) for s in scale]  # silent channels
        what = f"block {block.index}: inputs of the MLP"
        factor, _ = damped_cholesky(gram.mean, self.ridge, what)
        inverse, metric = torch.cholesky_inverse(factor).float(), (factor @ factor.t()).float()

        def curved(change: Parts) -> Parts:
            """The Hessian of the linearised error times a change."""
            total: Parts = [
                self.ridge * (metric @ c) * s for c, s in zip(change, scale, strict=True)
            ]
            for _, piece, slopes in pieces():
                moved = [slope * (piece @ c) for slope, c in zip(slopes, change, strict=True)]
                total = _sum(total, back(torch.stack(moved).sum(0) @ consumer, piece, slopes))
            return total

        def preconditioned(gradient: Parts) -> Parts:
            return [inverse @ (g / s) for g, s in zip(gradient, scale, strict=True)]

        return conjugate_gradients(curved, preconditioned, residual, self.iterations)

    def _slopes(self, block: Block, inputs: Tensor) -> Parts:
        with torch.enable_grad():
            produced = [part.detach().requires_grad_() for part in block.produced(inputs)]
            total = block.channels(produced).sum()
        return [slope.float() for slope in torch.autograd.grad(total, produced)]

    def _error(self, block: Block, inputs: Tensor, targets: Tensor) -> float:
        consumer, total = block.consumer_weight.to(inputs.dtype), 0.0
        for piece, target in zip(inputs.split(TOKENS), targets.split(TOKENS), strict=True):
            found = block.channels(block.produced(piece)) @ consumer
            total += float((target - found).double().square().sum())
        return total

    def _refit(self, block: Block, inputs: Tensor, targets: Tensor) -> None:
        gram, cross = Gram(), Cross()
        for piece, target in zip(inputs.split(TOKENS), targets.split(TOKENS), strict=True):
            hidden = block.channels(block.produced(piece))
            mask = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
            gram.update(hidden, mask=mask)
            cross.update(hidden, target, mask=mask)
        what = f"block {block.index}: consumer after the step"
        found = least_squares(gram.mean, cross.mean, block.consumer_weight, self.refit_ridge, what)
        block.set_consumer_weight(found)


def _sum(total: Parts, added: Parts) -> Parts:
    return [t + a for t, a in zip(total, added, strict=True)] if total else added
