"""What becomes of each block in the finished model, held against the dense one on the same text."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from secateur.allocate.base import Evidence
from secateur.calibration.collect import Store
from secateur.calibration.layer_stream import Stream
from secateur.calibration.needs import Needs
from secateur.data.tokens import Tokens
from secateur.models.block import Block
from secateur.models.model import Model
from secateur.structure.error_curve import Curve
from secateur.structure.units import MLP, Matrix, Unit

TOKENS = 2048  # looked at, where there are as many
MOST_NUMBERS = 2**26  # of the dense model's states that are kept: 256 MB
STREAMED_NUMBERS = 2**24  # where the model is not in memory either: 64 MB
PARTS = ("attention", "mlp", "stream")
POINTS = 17  # of a curve that is told
SHARES = (0.5, 0.9, 0.99, 0.999)  # of energy
WIDEST = 2048  # Gram whose eigenvalues take a small part of a forward pass

Errors = dict[str, float | None]


class BlockComparison:
    """What attention and MLP of every dense block add, and the stream behind the block.

    Kept for some calibration tokens, to be compared with what the finished model makes of the same
    tokens, errors of the blocks before included. Don't use it where the residual stream is sliced:
    its states then are those of another basis.

    ``errors`` has by block the share of the dense energy that is lost: Σ‖ŷ − y‖² / Σ‖y‖². None
    where nothing was there, or what is there now is not finite. Of a block that is gone, all that
    it added.
    """

    def __init__(self, model: Model, tokens: Tokens) -> None:
        few = _few(model, tokens)
        line = self._stream(model, few)
        self._dense = [_made(line, block) for block in model.in_turn()]
        self.line = self._stream(model, few)
        self.errors: list[Errors] = []

    @staticmethod
    @torch.no_grad()
    def _stream(model: Model, tokens: Tokens) -> Stream:
        return Stream(model, tokens, len(tokens))

    def follow(self, block: Block) -> None:
        """Go through the next block as it is now."""
        small, dense = _made(self.line, block), self._dense[len(self.errors)]
        self.errors.append({part: _lost(dense[part], small.get(part)) for part in dense})


@torch.no_grad()
def _made(line: Stream, block: Block) -> dict[str, Tensor]:
    """What a block makes of a stream of one batch, which moves on."""
    (batch,) = line.batches
    real = line.mask(batch, block)
    with _heard(block) as added:
        after = line.through(block, line.at(batch))
    line.put(batch, after)
    added["stream"] = after[:, line.part(block)]
    rows = {part: v.reshape(*real.shape, -1)[real] for part, v in added.items()}  # OPT's
    return {part: values.cpu() for part, values in rows.items()}


def _few(model: Model, tokens: Tokens) -> Tokens:
    """As many of the tokens as are kept: whole windows, or the beginning of one."""
    width = model.blocks[0].hidden
    most_numbers = MOST_NUMBERS if model.offload is None else STREAMED_NUMBERS
    most = max(1, min(TOKENS, most_numbers // (width * len(PARTS) * len(model.blocks))))
    if tokens.length > most:
        return model.use.beginning(tokens, most)
    return tokens[: max(1, most // tokens.length)]


@contextmanager
def _heard(block: Block) -> Iterator[dict[str, Tensor]]:
    """What attention and MLP give while the block runs; nothing of a block that is gone."""
    heard: dict[str, Tensor] = {}

    def attention(_: Any, __: Any, output: Any) -> None:
        heard["attention"] = output[0] if isinstance(output, tuple) else output

    def mlp(_: Any, __: Any, output: Tensor) -> None:
        heard["mlp"] = output

    hooks = [
        *(mixer.module.register_forward_hook(attention) for mixer in block.mixers),
        *(part.consumer.register_forward_hook(mlp) for part in block.feed_forwards),
    ]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def _lost(dense: Tensor, small: Tensor | None) -> float | None:
    if small is None:
        return 1.0
    there = dense.double()
    whole = float(there.square().sum())
    lost = float((small.double().view_as(there) - there).square().sum())
    return lost / whole if whole > 0 and math.isfinite(lost) else None


def observations(
    units: Sequence[Unit], blocks: int, store: Store, evidence: Evidence, errors: list[Errors]
) -> dict[str, Any]:
    """What calibration and narrowing have shown of every block and unit, in a compact form.

    "influence" has of every dense block 1 − cosine of what it gets and gives, "errors" what
    :attr:`BlockComparison.errors` says, "curves" of every unit some shares kept and the predicted
    error at each, "directions" of every block how many of them hold how much of the energy of what
    the MLP's consumer reads.
    """
    influence, directions = [], []
    wide = {unit.block for unit in units if isinstance(unit, MLP) and unit.size > WIDEST}
    for index in range(blocks):
        more = () if index in wide else (Needs.HIDDEN_GRAM,)
        found = store.get(index, (Needs.INFLUENCE, *more))
        influence.append(_figure(float(found[Needs.INFLUENCE].mean)))
        gram = found.get(Needs.HIDDEN_GRAM)
        directions.append({} if gram is None else holding(gram.mean))
    return {
        "influence": influence,
        "errors": [{part: _figure(value) for part, value in own.items()} for own in errors],
        "curves": {unit.name: _told(unit, evidence.curves[unit.name]) for unit in units},
        "directions": directions if any(directions) else [],
    }


def holding(gram: Tensor) -> dict[str, int]:
    """How many eigenvectors of a Gram hold each of :data:`SHARES` of its trace, and of how many."""
    width = len(gram)
    if width > WIDEST or not width:
        return {}
    energy = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0.0).cumsum(0)
    if not float(energy[-1]) > 0:
        return {}
    marks = torch.tensor(SHARES, dtype=energy.dtype, device=energy.device) * energy[-1]
    counts = (torch.searchsorted(energy, marks) + 1).clamp_max(width).tolist()
    return {**{f"{share:g}": int(n) for share, n in zip(SHARES, counts, strict=True)}, "of": width}


def _told(unit: Unit, curve: Curve) -> dict[str, list[float | None]]:
    """Some of the shares that it may keep, of a matrix in bytes, and the errors there."""
    every = unit.sizes()
    some = sorted({every[round((len(every) - 1) * i / (POINTS - 1))] for i in range(POINTS)})

    def share(size: int) -> float:
        if not isinstance(unit, Matrix):
            return size / unit.size
        return unit.cost(size, unit.itemsize).bytes / unit.cost(unit.size, unit.itemsize).bytes

    return {
        "kept": [_figure(share(size)) for size in some],
        "errors": [_figure(curve.at(size)) for size in some],
    }


def _figure(value: float | None) -> float | None:
    """Four digits are as many as a picture has."""
    return None if value is None else float(f"{value:.4g}")
