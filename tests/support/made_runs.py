"""Folders as a finished run leaves them, made by hand."""

import copy
import json
from pathlib import Path
from typing import Any

SIDE: dict[str, Any] = {
    "parameters": 1000,
    "bytes": 4000,
    "perplexity": {"held.txt": 10.0},
    "tokens": {"held.txt": 640},
    "texts": {"held.txt": "aa"},
    "prompt": "Once upon",
    "sample": "a time there was a cat",
    "peak_memory_bytes": 5_000_000,
    "speed": {
        "prefill_tokens_per_second": 1000.0,
        "decode_tokens_per_second": 100.0,
        "prompt_tokens": 50,
        "new_tokens": 32,
    },
    "counts": "tokens",
    "tasks": {},
    "agreement": {},
}
SMALL = {
    "parameters": 800,
    "bytes": 3200,
    "perplexity": {"held.txt": 12.0},
    "sample": "a time there was a dog",
    "agreement": {"kl": 0.12, "top1": 0.75, "outputs": 640},
}
UNITS = [
    {
        "unit": f"layers.{i}.{kind}",
        "kind": kind,
        "before": 64,
        "after": 64 - 16 * i,
        "parameters": 10,
        "bytes": 40,
        "flops_per_token": 1,
        "cache_bytes_per_token": 0,
        "predicted_error": 0.01 * i,
        "predicted_loss": 0.03 * i,
    }
    for i in range(3)
    for kind in ("query_key", "mlp")
]
REPORT: dict[str, Any] = {
    "version": 2,
    "command": "secateur compress some/model out --keep 0.8",
    "model": {"source": "some/model", "model_type": "llama", "fingerprint": "f" * 16},
    "method": {"name": "auto", "options": {"keep": 0.8}},
    "allocator": {"name": "knapsack", "options": {"cells": 20000}},
    "budget": {
        "keep": 0.8,
        "of": "parameters",
        "total": 900,
        "reached": 0.79,
        "batch": 1,
        "length": 256,
    },
    "tier": "per-layer",
    "densified": 0,
    "libraries": [],
    "dense": SIDE,
    "compressed": SIDE | SMALL,
    "seconds": {"calibrate": 1.0, "evaluate": 2.0, "total": 3.5},
    "versions": {"secateur": "0.3.0", "torch": "2.9"},
    "seed": 0,
    "calibration": {"source": "corpus.txt", "samples": 4, "length": 32, "seed": 0},
    "observed": [
        {
            "influence": [0.3, 0.2, 0.1],
            "errors": [{"attention": 0.1 * i, "mlp": 0.2 * i, "stream": 0.1} for i in range(3)],
            "curves": {
                row["unit"]: {"kept": [0.0, 0.5, 1.0], "errors": [1.0, 0.1, 0.0]} for row in UNITS
            },
            "directions": [{"0.5": 2, "0.9": 9, "0.99": 30, "0.999": 50, "of": 64}] * 3,
        }
    ],
}
ONLY_VERSION_1 = ("model", "method", "tier", "dense", "compressed", "seconds", "versions")


def report(**changes: Any) -> dict[str, Any]:
    """A report of this version; ``dense`` and ``compressed`` change in part."""
    made = copy.deepcopy(REPORT)
    for side in ("dense", "compressed"):
        made[side] |= changes.pop(side, {})
    return made | changes


def first_version() -> dict[str, Any]:
    """A report as the first version wrote it."""
    made = {key: copy.deepcopy(REPORT[key]) for key in ONLY_VERSION_1}
    for side in ("dense", "compressed"):
        for key in ("counts", "tasks", "agreement", "texts"):
            del made[side][key]
    return made | {"version": 1, "budget": {"keep": 0.8, "of": "parameters", "reached": 0.79}}


def made_run(folder: Path, content: dict[str, Any] | None = None, units: Any = UNITS) -> Path:
    """Write a run with this report; weights are an empty file."""
    (folder / "secateur").mkdir(parents=True)
    (folder / "secateur" / "report.json").write_text(json.dumps(content or REPORT))
    (folder / "secateur" / "plan.json").write_text(json.dumps({"version": 2, "units": units}))
    (folder / "secateur" / "recipe.yaml").write_text("version: 3\nsteps:\n- method: auto\n")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    return folder
