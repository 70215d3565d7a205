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
    from secateur.allocate.alpha import AlphaPruning
    from secateur.allocate.angular import Angular
    from secateur.allocate.farms import FARMS
    from secateur.allocate.fluctuation import Fluctuation
    from secateur.allocate.greedy import Greedy
    from secateur.allocate.influence import EntropicInfluence
    from secateur.allocate.knapsack import Knapsack
    from secateur.allocate.least_error import LeastError
    from secateur.allocate.middle import Middle
    from secateur.allocate.nirvana import TwoThresholds
    from secateur.allocate.plain import PlainWidth
    from secateur.allocate.spdy import SPDY
    from secateur.allocate.uniform import Uniform
    from secateur.allocate.welore import WeLore
    from secateur.calibration import Store, calibrate
    from secateur.evaluate.judge import Questions, judge_apart
    from secateur.export import export_dense, export_plain
    from secateur.gguf.export import export_gguf
    from secateur.goal import Goal
    from secateur.methods.armor import Armor
    from secateur.methods.auto import Auto
    from secateur.methods.base import Method
    from secateur.methods.block_dense import BlockDenseProjection
    from secateur.methods.block_shuffle import BlockShuffleProjection
    from secateur.methods.cfsp import CFSP
    from secateur.methods.compot import COMPOT
    from secateur.methods.cospadi import CoSpaDi
    from secateur.methods.dsformer import DSFormer
    from secateur.methods.flap import FLAP
    from secateur.methods.forms import Forms
    from secateur.methods.gptq import GPTQ
    from secateur.methods.ispasp import ISpaSP
    from secateur.methods.llm_pruner import LLMPruner
    from secateur.methods.magnitude import Magnitude
    from secateur.methods.modegpt import MoDeGPT
    from secateur.methods.monarch import MonarchProjection
    from secateur.methods.nirvana import Nirvana
    from secateur.methods.obspa import OBSPA
    from secateur.methods.ptqtp import PTQTP
    from secateur.methods.replace import Replace
    from secateur.methods.rtn import RTN
    from secateur.methods.shortgpt import ShortGPT
    from secateur.methods.sleb import SLEB
    from secateur.methods.slicegpt import SliceGPT
    from secateur.methods.sparsegpt import SparseGPT
    from secateur.methods.svd import SVD
    from secateur.methods.svd_llm import SVDLLM
    from secateur.methods.wanda import Wanda
    from secateur.methods.wanda_sp import WandaSP
    from secateur.methods.welore import LowRankWeLore
    from secateur.methods.ziplm import ZipLM
    from secateur.model import Model, Settings
    from secateur.opening import open_model
    from secateur.pipeline import compress, save
    from secateur.plan import Plan, make_plan
    from secateur.recipe import Recipe, Step, read_recipe
    from secateur.scores import score
    from secateur.select import select_calibration
    from secateur.sequence import compress_in_steps
    from secateur.text import Calibration, Text, calibration_tokens

_HOMES = {
    "AlphaPruning": "secateur.allocate.alpha",
    "Angular": "secateur.allocate.angular",
    "Armor": "secateur.methods.armor",
    "Auto": "secateur.methods.auto",
    "BlockDenseProjection": "secateur.methods.block_dense",
    "BlockShuffleProjection": "secateur.methods.block_shuffle",
    "CFSP": "secateur.methods.cfsp",
    "COMPOT": "secateur.methods.compot",
    "Calibration": "secateur.text",
    "CoSpaDi": "secateur.methods.cospadi",
    "DSFormer": "secateur.methods.dsformer",
    "EntropicInfluence": "secateur.allocate.influence",
    "FARMS": "secateur.allocate.farms",
    "FLAP": "secateur.methods.flap",
    "Fluctuation": "secateur.allocate.fluctuation",
    "Forms": "secateur.methods.forms",
    "GPTQ": "secateur.methods.gptq",
    "Goal": "secateur.goal",
    "Greedy": "secateur.allocate.greedy",
    "ISpaSP": "secateur.methods.ispasp",
    "Knapsack": "secateur.allocate.knapsack",
    "LLMPruner": "secateur.methods.llm_pruner",
    "LeastError": "secateur.allocate.least_error",
    "LowRankWeLore": "secateur.methods.welore",
    "Magnitude": "secateur.methods.magnitude",
    "Method": "secateur.methods.base",
    "Middle": "secateur.allocate.middle",
    "MoDeGPT": "secateur.methods.modegpt",
    "Model": "secateur.model",
    "MonarchProjection": "secateur.methods.monarch",
    "Nirvana": "secateur.methods.nirvana",
    "OBSPA": "secateur.methods.obspa",
    "PTQTP": "secateur.methods.ptqtp",
    "PlainWidth": "secateur.allocate.plain",
    "Plan": "secateur.plan",
    "Questions": "secateur.evaluate.judge",
    "RTN": "secateur.methods.rtn",
    "Recipe": "secateur.recipe",
    "Replace": "secateur.methods.replace",
    "SLEB": "secateur.methods.sleb",
    "SPDY": "secateur.allocate.spdy",
    "SVD": "secateur.methods.svd",
    "SVDLLM": "secateur.methods.svd_llm",
    "Settings": "secateur.model",
    "ShortGPT": "secateur.methods.shortgpt",
    "SliceGPT": "secateur.methods.slicegpt",
    "SparseGPT": "secateur.methods.sparsegpt",
    "Step": "secateur.recipe",
    "Store": "secateur.calibration",
    "Text": "secateur.text",
    "TwoThresholds": "secateur.allocate.nirvana",
    "Uniform": "secateur.allocate.uniform",
    "Wanda": "secateur.methods.wanda",
    "WandaSP": "secateur.methods.wanda_sp",
    "WeLore": "secateur.allocate.welore",
    "ZipLM": "secateur.methods.ziplm",
    "calibrate": "secateur.calibration",
    "calibration_tokens": "secateur.text",
    "compress": "secateur.pipeline",
    "compress_in_steps": "secateur.sequence",
    "judge_apart": "secateur.evaluate.judge",
    "make_plan": "secateur.plan",
    "open_model": "secateur.opening",
    "save": "secateur.pipeline",
    "score": "secateur.scores",
    "export_dense": "secateur.export",
    "export_gguf": "secateur.gguf.export",
    "export_onnx": "secateur.graph",
    "export_plain": "secateur.export",
    "read_recipe": "secateur.recipe",
    "select_calibration": "secateur.select",
}

__all__ = [
    "CFSP",
    "COMPOT",
    "FARMS",
    "FLAP",
    "GPTQ",
    "OBSPA",
    "PTQTP",
    "RTN",
    "SLEB",
    "SPDY",
    "SVD",
    "SVDLLM",
    "AlphaPruning",
    "Angular",
    "Armor",
    "Auto",
    "BlockDenseProjection",
    "BlockShuffleProjection",
    "Calibration",
    "CoSpaDi",
    "DSFormer",
    "EntropicInfluence",
    "Fluctuation",
    "Forms",
    "Goal",
    "Greedy",
    "ISpaSP",
    "InputError",
    "Knapsack",
    "LLMPruner",
    "LeastError",
    "LowRankWeLore",
    "Magnitude",
    "Method",
    "Middle",
    "MoDeGPT",
    "Model",
    "MonarchProjection",
    "Nirvana",
    "PlainWidth",
    "Plan",
    "Questions",
    "Recipe",
    "Replace",
    "Settings",
    "ShortGPT",
    "SliceGPT",
    "SparseGPT",
    "Step",
    "Store",
    "Text",
    "TwoThresholds",
    "Uniform",
    "Wanda",
    "WandaSP",
    "WeLore",
    "ZipLM",
    "__version__",
    "calibrate",
    "calibration_tokens",
    "compress",
    "compress_in_steps",
    "export_dense",
    "export_gguf",
    "export_onnx",
    "export_plain",
    "judge_apart",
    "make_plan",
    "open_model",
    "read_recipe",
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
