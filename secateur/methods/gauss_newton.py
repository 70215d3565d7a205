"""The linears before an activation, refitted to what the MLP's output should be."""

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.calibration.needs import Needs
from secateur.calibration.statistics import Cross, Gram
from secateur.calibration.summation import add_up
from secateur.calibration.token_batches import TokenBatches
from secateur.linalg.least_squares import conjugate_gradients, damped_cholesky, least_squares
from secateur.models.block import Block
from secateur.models.linear_ops import inputs_by_outputs
from secateur.utils.memory import free_bytes
from secateur.utils.precision import exact, exact_device

REMEMBERED = 4 * 2**30  # bytes of slopes that are kept between iterations, at most
SHARE = 4  # and no more than this part of the memory that is free
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

    def refine(self, block: Block, rows: TokenBatches) -> None:
        """Change the producers of ``block`` and then its consumer, in place; targets have no bias.

        On several ranks each works on its own rows, and all come to the same weights.
        """
        judge, fit = rows.where(_judges), rows.where(lambda at: ~_judges(at))
        step = self._step(block, fit)
        before, weights = self._error(block, judge), block.mlp.producer_weights
        originals = [weight.clone() for weight in weights]
        for scale in (1.0, 0.5, 0.25):
            for weight, original, change in zip(weights, originals, step, strict=True):
                weight.data.copy_(original + scale * change)
            if self._error(block, judge) < before:
                self._refit(block, rows)
                return
        for weight, original in zip(weights, originals, strict=True):
            weight.data.copy_(original)

    def _step(self, block: Block, rows: TokenBatches) -> Parts:
        """The change of every part, (inputs, channels), float32."""
        consumer = inputs_by_outputs(block.mlp.consumer).float()
        room = _room(consumer.device, rows.ranks.local_world_size)
        cached: dict[int, Parts] = {}

        def back(errors: Tensor, piece: Tensor, slopes: Parts) -> Parts:
            """The gradient of ½‖errors‖² by every part."""
            hidden = errors @ consumer.t()
            return [piece.t() @ (slope * hidden) for slope in slopes]

        shapes = [weight.shape for weight in block.mlp.producer_weights]
        gram, errors_back = Gram(), _zeros(shapes, consumer.device)
        squares = _zeros([shape[1:] for shape in shapes], consumer.device)
        for number, (inputs, targets) in enumerate(rows):
            hidden, slopes = self._linearised(block, inputs)
            room -= sum(slope.nbytes for slope in slopes)
            if room > 0:
                cached[number] = slopes
            errors, piece = targets.float() - hidden @ consumer, inputs.float()
            _add(errors_back, back(errors, piece, slopes))
            _add(squares, [slope.square().sum(0) for slope in slopes])
            gram.update(piece, mask=_all(piece))
        add_up({Needs.MLP_INPUT_GRAM: gram}, rows.ranks)
        rows.ranks.all_reduce([*errors_back, *squares])
        count = gram.tokens
        residual, energy = (
            [(total / count).to(consumer) for total in sums] for sums in (errors_back, squares)
        )
        channel = consumer.square().sum(1)
        scale = [channel * e for e in energy]
        scale = [s.clamp_min(1e-12 * float(s.max()) + 1e-30) for s in scale]  # silent channels
        what = f"block {block.index}: inputs of the MLP"
        factor, _ = damped_cholesky(gram.mean, self.ridge, what)
        inverse, metric = (
            found.to(consumer) for found in (torch.cholesky_inverse(factor), factor @ factor.t())
        )

        def curved(change: Parts) -> Parts:
            """The Hessian of the linearised error times a change."""
            total = _zeros(shapes, consumer.device)
            for number, (inputs, _) in enumerate(rows):
                slopes = cached.get(number) or self._linearised(block, inputs)[1]
                piece = inputs.float()
                moved = [slope * (piece @ c) for slope, c in zip(slopes, change, strict=True)]
                _add(total, back(sum(moved[1:], moved[0]) @ consumer, piece, slopes))
            rows.ranks.all_reduce(total)
            return [
                (t / count).to(c) + self.ridge * (metric @ c) * s
                for t, c, s in zip(total, change, scale, strict=True)
            ]

        def preconditioned(gradient: Parts) -> Parts:
            return [inverse @ (g / s) for g, s in zip(gradient, scale, strict=True)]

        return conjugate_gradients(
            curved, preconditioned, residual, self.iterations, rows.ranks.agree
        )

    def _linearised(self, block: Block, inputs: Tensor) -> tuple[Tensor, Parts]:
        """The channels, and their slopes by every part."""
        with torch.enable_grad():
            produced = [part.detach().requires_grad_() for part in block.mlp.produced(inputs)]
            hidden = block.mlp.channels(produced)
            slopes = torch.autograd.grad(hidden.sum(), produced)
        return hidden.detach().float(), [slope.float() for slope in slopes]

    def _error(self, block: Block, rows: TokenBatches) -> float:
        consumer = inputs_by_outputs(block.mlp.consumer)
        total = torch.zeros(1, dtype=torch.float64, device=exact_device(consumer.device))
        for inputs, targets in rows:
            found = block.mlp.channels(block.mlp.produced(inputs)) @ consumer.to(inputs.dtype)
            total += exact(targets - found).square().sum()
        rows.ranks.all_reduce([total])
        return float(total)

    def _refit(self, block: Block, rows: TokenBatches) -> None:
        gram, cross = Gram(), Cross()
        for inputs, targets in rows:
            hidden = block.mlp.channels(block.mlp.produced(inputs))
            gram.update(hidden, mask=_all(hidden))
            cross.update(hidden, targets, mask=_all(hidden))
        add_up({Needs.HIDDEN_GRAM: gram, Needs.HIDDEN_TARGET: cross}, rows.ranks)
        what = f"block {block.index}: consumer after the step"
        found = least_squares(
            gram.mean, cross.mean, block.mlp.consumer_weight, self.refit_ridge, what
        )
        block.mlp.set_consumer_weight(found)


def _zeros(shapes: list[torch.Size], device: torch.device) -> Parts:
    """Sums in float64: in float32 they would depend on how many processes share them."""
    home = exact_device(device)
    return [torch.zeros(shape, dtype=torch.float64, device=home) for shape in shapes]


def _add(total: Parts, added: Parts) -> None:
    for own, more in zip(total, added, strict=True):
        own += more.to(own.device)


def _room(device: torch.device, neighbours: int) -> int:
    """Bytes for slopes, where so many processes on this machine take as much."""
    sharing = neighbours if device.type == "cpu" else 1
    return min(REMEMBERED, free_bytes(device) // (SHARE * sharing))


def _judges(at: Tensor) -> Tensor:
    """Every seventh run of 32 tokens: at all positions of windows of powers of two."""
    return at // 32 % 7 == 6


def _all(rows: Tensor) -> Tensor:
    return torch.ones(len(rows), dtype=torch.bool, device=rows.device)
