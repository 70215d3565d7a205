"""Error against bytes: what the matrices of a model lose by each form at a given size."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from secateur.calibration.collect import collect
from secateur.calibration.layer_stream import Stream
from secateur.data.tokens import Calibration
from secateur.methods.form import FormMethod
from secateur.methods.forms import Forms
from secateur.models.loading import open_model, skeleton
from secateur.models.model import Settings
from secateur.pipeline.input_checks import read_calibration
from secateur.structure.units import Matrix
from secateur.utils.errors import InputError
from secateur.utils.progress import Progress

#: of the bytes of a matrix
SHARES = (0.75, 0.5, 0.375, 0.25, 0.1875, 0.125)
#: share of bytes and share of the output that is lost
Point = tuple[float, float]


def spectrum(
    source: str,
    methods: Forms,
    calibration: Calibration,
    settings: Settings,
    progress: Progress,
) -> dict[str, Any]:
    """Every form of every matrix by several methods: its bytes, and the output error it makes.

    Errors are shares of a layer's own output on calibration text, in one metric for all methods,
    whatever they look at themselves. Every form is solved, so it takes as long as that.

    Raises:
        InputError: anything wrong with the input, or no method has a form for the model.
    """
    obstacle = FormMethod.obstacle(methods, skeleton(source, settings))  # nothing is written
    if obstacle is not None:
        raise InputError(f"model {source!r}: {obstacle}.")
    tokens = read_calibration(source, calibration, settings)
    model = open_model(source, settings)
    found: dict[str, dict[str, list[Point]]] = {name: {} for name in methods.parts}
    units = [unit for unit in methods.units(model, 1) if isinstance(unit, Matrix)]
    with torch.no_grad(), progress.stage("reshaping matrices", len(units)) as advance:
        stream = Stream(model, tokens)
        for block in model.in_turn():
            statistics = collect(stream, block, methods.needs)
            for unit in (unit for unit in units if unit.block == block.index):
                with block.solving():
                    curve = methods.solve(unit, block, statistics).curve
                whole = unit.cost(unit.size, model.stored.itemsize).bytes
                for points in found.values():
                    points[unit.name] = []
                for size, form in enumerate(unit.forms, 1):
                    point = form.bytes(model.stored.itemsize) / whole, curve.at(size)
                    found[form.by][unit.name].append(point)
                advance(1)
    return {
        "model": source,
        "calibration": asdict(calibration),
        "shares": SHARES,
        "methods": {name: mean_errors([*own.values()]) for name, own in found.items()},
        "matrices": found,
    }


def mean_errors(matrices: Sequence[Sequence[Point]]) -> list[float | None]:
    """At every share the mean over matrices of the least error within it.

    None where some matrix has no form so small.
    """
    found: list[float | None] = []
    for share in SHARES:
        best = [[lost for size, lost in points if size <= share] for points in matrices]
        found.append(sum(map(min, best)) / len(best) if all(best) else None)
    return found
