"""Judging whole plans before any is chosen: all units narrowed at once, from pieces kept ready."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from secateur.apply.surgery import narrowed
from secateur.calibration.collect import Store
from secateur.calibration.needs import of_unit
from secateur.data.tokens import Tokens
from secateur.methods.base import Method
from secateur.models.block import Block
from secateur.models.model import Model
from secateur.scoring.divergence import Divergence, solved
from secateur.structure.narrowing import Narrowing
from secateur.structure.units import Unit

WINDOWS = 16  #: calibration windows to judge on


class PlanScorer:
    """Divergence of the model with every unit at some size, from the dense model.

    What replaces each unit at each of its ``allowed`` sizes is solved once, from statistics of the
    dense model, and kept; a :class:`~secateur.methods.base.SequentialMethod` knows no targets here.
    Consumers are kept in the model's number format, on the CPU, and so are the hidden states before
    the first block: in a plan that begins like the last one, only what is behind runs again.
    """

    def __init__(
        self,
        model: Model,
        method: Method,
        units: Sequence[Unit],
        *,
        allowed: Mapping[str, Sequence[int]],
        store: Store,
        tokens: Tokens,
    ) -> None:
        self.model = model
        self.units = [unit for unit in units if not unit.fixed]
        self._pieces: dict[tuple[str, int], Narrowing] = {}
        with torch.no_grad():
            windows = tokens[:WINDOWS]
            self._divergence = Divergence(model, windows)
            self._first = self._divergence.stream.copy()
            self._last: list[tuple[int, ...]] = []  # sizes of the last plan, block by block
            self._at = 0  # the block that the stream stands before
            for block in model.blocks:
                statistics = store.get(block.index, method.needs, model.exact_device)
                for unit in self.units:
                    if unit.block != block.index:
                        continue
                    with block.solving():
                        solution = method.solve(unit, block, of_unit(statistics, unit))
                    for size in allowed[unit.name]:
                        if size < unit.size:
                            piece = _moved(solved(block, solution, size), torch.device("cpu"))
                            self._pieces[unit.name, size] = _stored(piece, model.module.dtype)

    @torch.no_grad()
    def __call__(self, sizes: Mapping[str, int]) -> float:
        """In nats; the model is left as it was.

        Raises:
            InputError: it is not finite.
        """
        with ExitStack() as stack:
            for unit in self.units:
                if sizes[unit.name] < unit.size:
                    kept = self._pieces[unit.name, sizes[unit.name]]
                    piece = _moved(kept, self.model.exact_device)
                    stack.enter_context(narrowed(self.model.blocks[unit.block], unit, piece))
            return self._divergence.of(self._reached(sizes))

    def _reached(self, sizes: Mapping[str, int]) -> Block:
        """The first block of other sizes than last time; the stream is brought before it."""
        blocks, stream = self.model.blocks, self._divergence.stream
        own = [tuple(sizes[u.name] for u in self.units if u.block == b.index) for b in blocks]
        pairs = zip(own[:-1], self._last, strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if same < self._at:
            stream.back_to(self._first)
            self._at = 0
        for block in blocks[self._at : same]:
            stream.advance(block)
        self._at, self._last = same, own
        return blocks[same]


def _moved(narrowing: Narrowing, device: torch.device) -> Narrowing:
    parts: dict[str, Any] = {f.name: getattr(narrowing, f.name) for f in fields(narrowing)}
    moved = {name: part.to(device) for name, part in parts.items() if isinstance(part, Tensor)}
    layers = {path: layer.to(device) for path, layer in narrowing.layers.items()}
    return replace(narrowing, layers=layers, **moved)


def _stored(narrowing: Narrowing, dtype: torch.dtype) -> Narrowing:
    """Its consumer as it will be stored, which takes least room."""
    rows = narrowing.consumer
    return narrowing if rows is None else replace(narrowing, consumer=rows.to(dtype))
