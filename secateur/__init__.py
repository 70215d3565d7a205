"""Secateur makes trained transformers smaller and faster.

The public names are loaded when first used. The one thing that happens on import: once transformers
is (or gets) imported, its auto classes learn to open per-layer checkpoints.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import wrapt

from secateur.errors import InputError
from secateur.version import __version__

if TYPE_CHECKING:
    from secateur.allocate.influence import EntropicInfluence
    from secateur.allocate.knapsack import Knapsack
    from secateur.allocate.uniform import Uniform
    from secateur.calibration import Store, calibrate
    from secateur.evaluate.judge import Questions, judge_apart
    from secateur.goal import Goal
    from secateur.methods.auto import Auto
    from secateur.methods.base import Method
    from secateur.methods.modegpt import MoDeGPT
    from secateur.model import Model, Settings, open_model
    from secateur.pipeline import compress, save
    from secateur.plan import Plan, make_plan
    from secateur.scores import score
    from secateur.select import select_calibration
    from secateur.text import Calibration, Text, calibration_tokens

_HOMES = {
    "Auto": "secateur.methods.auto",
    "Calibration": "secateur.text",
    "Goal": "secateur.goal",
    "EntropicInfluence": "secateur.allocate.influence",
    "Knapsack": "secateur.allocate.knapsack",
    "Uniform": "secateur.allocate.uniform",
    "Method": "secateur.methods.base",
    "MoDeGPT": "secateur.methods.modegpt",
    "Model": "secateur.model",
    "Plan": "secateur.plan",
    "Questions": "secateur.evaluate.judge",
    "Settings": "secateur.model",
    "Store": "secateur.calibration",
    "Text": "secateur.text",
    "calibrate": "secateur.calibration",
    "calibration_tokens": "secateur.text",
    "compress": "secateur.pipeline",
    "judge_apart": "secateur.evaluate.judge",
    "make_plan": "secateur.plan",
    "score": "secateur.scores",
    "select_calibration": "secateur.select",
    "open_model": "secateur.model",
    "save": "secateur.pipeline",
}

__all__ = [
    "Auto",
    "Calibration",
    "EntropicInfluence",
    "Goal",
    "InputError",
    "Knapsack",
    "Method",
    "MoDeGPT",
    "Model",
    "Plan",
    "Questions",
    "Settings",
    "Store",
    "Text",
    "Uniform",
    "__version__",
    "calibrate",
    "calibration_tokens",
    "compress",
    "judge_apart",
    "make_plan",
    "open_model",
    "save",
    "score",
    "select_calibration",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'secateur' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def _register(_: Any) -> None:
    from secateur.register import register

    register()


# transformers takes seconds to import and has no entry points to be found by, so the registration
# waits for it instead of pulling it in for `secateur --help`. It hangs on the package itself: its
# submodules import each other in circles, in the middle of which no class can be made.
wrapt.register_post_import_hook(_register, "transformers")
