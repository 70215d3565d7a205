"""Prices in time: what every size of every unit takes on this machine, measured once and kept."""

import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field

from secateur.apply.surgery import narrowed
from secateur.calibration.layer_stream import Stream
from secateur.io.cache import cached_file, keep
from secateur.io.schema import Record, read_record
from secateur.models.block import Block
from secateur.models.model import Model
from secateur.structure.budget import Budget
from secateur.structure.costs import Prices
from secateur.structure.units import EVERY_BLOCK, Matrix, Unit
from secateur.utils.errors import InputError
from secateur.utils.precision import check_exact
from secateur.version import __version__

POINTS = 9  # sizes measured of each kind of unit; linear between them
ROUNDS = 7  # of which the fastest counts
MOST_BYTES = 2**20
SECONDS = 0.002  # a timing takes at least this long


def measured(model: Model, units: Sequence[Unit], budget: Budget) -> Prices:
    """Nanoseconds of a forward pass over ``budget.batch`` × ``budget.length`` tokens.

    All blocks of a dense model have one shape, so the first stands for all; of an encoder and a
    decoder, the first of each. Its units are timed one by one, the others at full size:

        mlp(k)  = T(mlp k) − T(mlp 0),  heads(k) = T(heads k) − T(heads 0)
        query_key(k) = T(qk k) − T(qk 0),   value_output(k) = T(vo k, qk 0) − T(vo 0, qk 0)

    and never less at a larger size. What is left of a whole forward pass is fixed; a block timed by
    itself stays in the processor's cache or waits for each launch, so where the parts are more than
    the whole they are scaled to it. The table is kept in the user's cache for this machine, model
    shape and number format.

    Raises:
        InputError: the model can't read that many tokens, or its device is not timed.
    """
    check_exact(model.device, "--target latency")
    check_timed(units)
    check_length(model, budget)
    own = _identity(model, budget)
    path = cached_file("latency", own)
    table = _read(path)
    keys = {unit.name: _key(model.blocks[unit.block], unit.kind) for unit in units}
    if table is None or not {*keys.values()} <= table.nanoseconds.keys():
        with torch.inference_mode():
            table = _measure(model, budget, own)
        keep(path, table.model_dump_json(indent=1))
    dense = sum(max(table.nanoseconds[key].values()) for key in keys.values())
    scale = min(1.0, table.forward / max(1, dense))
    prices = {u.name: _between(u, table.nanoseconds[keys[u.name]], scale) for u in units}
    whole = sum(prices[u.name][u.size] for u in units)
    return Prices("latency", prices, max(0, table.forward - whole))


def check_timed(units: Sequence[Unit]) -> None:
    """Refuse units that no single block has.

    Raises:
        InputError: one runs through all blocks.
    """
    through = [unit.name for unit in units if unit.block == EVERY_BLOCK]
    if through:
        raise InputError(
            f"latency is timed in one block, and unit {through[0]!r} runs through all of them; "
            f"choose another --target, e.g. parameters."
        )
    if any(isinstance(unit, Matrix) for unit in units):
        raise InputError(
            "latency is timed for widths, not for the forms of a matrix: choose another --target, "
            "e.g. bytes."
        )


def check_length(model: Model, budget: Budget) -> None:
    """Refuse a forward pass over more tokens than the model reads; needs no weights.

    Raises:
        InputError: it reads fewer.
    """
    if model.positions is not None and budget.length > model.positions:
        raise InputError(
            f"latency of {budget.length} tokens: the model reads at most {model.positions}; ask "
            f"for --latency-length {model.positions} or less."
        )


class Table(Record):
    """Times measured: of a whole forward pass, and of one unit of each kind at some sizes.

    The kinds of a decoder behind an encoder are apart, as :func:`_key` calls them.
    """

    of: dict[str, Any]
    forward: int = Field(ge=0)
    nanoseconds: dict[str, dict[int, Annotated[int, Field(ge=0)]]]


def _key(block: Block, kind: str) -> str:
    return kind if block.anatomy.crossing is None else f"decoder {kind}"


def _read(path: Path) -> Table | None:
    """A table from the cache; what is missing or damaged is measured again."""
    try:
        return read_record(Table, path, "latency table", MOST_BYTES)
    except InputError:
        return None


def _identity(model: Model, budget: Budget) -> dict[str, Any]:
    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    config = model.config.to_dict()
    example = model.use.example(1, budget.length)
    return {
        "secateur": __version__,
        "torch": torch.__version__,
        "machine": [platform.node(), platform.machine(), name, torch.get_num_threads()],
        "dtype": str(model.module.dtype),
        "shape": {k: v for k, v in sorted(config.items()) if isinstance(v, (int, str))},
        "attention": model.config._attn_implementation,
        "model_type": config["model_type"],
        "batch": budget.batch,
        "length": budget.length,
        "input": [list(part.shape) for part in (example.ids, example.mask)],
    }


def _measure(model: Model, budget: Budget, own: dict[str, Any]) -> Table:
    tokens = model.use.example(budget.batch, budget.length)
    stream = Stream(model, tokens, rows=budget.batch)
    states = stream.at(stream.batches[0])
    whole = partial(model.module, **model.use.inputs(tokens.to(model.device)))
    firsts = {block.anatomy.blocks: block.index for block in reversed(model.blocks)}.values()
    dense = [model.blocks[index] for index in firsts]
    every = [u for block in dense for u in block.units(1, [view.kind for view in block.views])]
    units = {(unit.block, unit.kind): unit for unit in every}
    jobs: dict[tuple[int, str, int], dict[str, int]] = {}
    for (index, kind), unit in units.items():
        part = [u for u in every if (u.block, u.part) == (index, unit.part)]
        unread = {u.kind: 0 for u in part if u.serves == kind}
        for size in _points(unit):
            jobs[index, kind, size] = {kind: size} | unread
    seconds = dict.fromkeys(jobs, float("inf"))
    forward = float("inf")
    for _ in range(ROUNDS):  # round by round, so that a slow moment hits all alike
        for job, sizes in jobs.items():
            block = model.blocks[job[0]]
            with _at(block, {kind: units[job[0], kind] for kind in sizes}, sizes):
                found = _timed(partial(stream.through, block, states), states.device)
                seconds[job] = min(seconds[job], found)
        forward = min(forward, _timed(whole, states.device))
    nanoseconds = {}
    for (index, kind), unit in units.items():
        points = _points(unit)
        times = np.maximum.accumulate([seconds[index, kind, size] for size in points])
        nanoseconds[_key(model.blocks[index], kind)] = {
            size: round(1e9 * float(t - times[0])) for size, t in zip(points, times, strict=True)
        }
    return Table(of=own, forward=round(1e9 * forward), nanoseconds=nanoseconds)


def _points(unit: Unit) -> list[int]:
    allowed = unit.sizes()
    wanted = np.linspace(0, unit.size, POINTS)
    return sorted({min(allowed, key=lambda s: abs(s - w)) for w in wanted})


@contextmanager
def _at(block: Block, units: Mapping[str, Unit], sizes: Mapping[str, int]) -> Iterator[None]:
    with ExitStack() as stack:
        for kind, size in sizes.items():
            if size < units[kind].size:
                narrowing = block.view(units[kind]).arbitrary(size)
                stack.enter_context(narrowed(block, units[kind], narrowing))
        yield


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, from as many as make a timing of :data:`SECONDS`."""
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    calls, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < SECONDS or not calls:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        calls += 1
    return spent / calls


def _between(unit: Unit, points: Mapping[int, int], scale: float) -> dict[int, int]:
    found = scale * np.interp(unit.sizes(), list(points), list(points.values()))
    return {size: int(ns) for size, ns in zip(unit.sizes(), found, strict=True)}
