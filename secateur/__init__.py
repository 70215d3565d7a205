"""Secateur makes trained transformers smaller and faster.

The public names are loaded when first used. The one thing that happens on import: once transformers
is (or gets) imported, its auto classes learn to open per-layer checkpoints.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import wrapt

from secateur.utils.errors import InputError
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
    from secateur.calibration.collect import Store, calibrate
    from secateur.data.tokens import Calibration, Text, calibration_tokens
    from secateur.evaluate.evaluator import Questions, judge_apart
    from secateur.export.checkpoint import export_dense, export_plain
    from secateur.export.gguf.export import export_gguf
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
    from secateur.methods.step import Step
    from secateur.methods.svd import SVD
    from secateur.methods.svd_llm import SVDLLM
    from secateur.methods.wanda import Wanda
    from secateur.methods.wanda_sp import WandaSP
    from secateur.methods.welore import LowRankWeLore
    from secateur.methods.ziplm import ZipLM
    from secateur.models.loading import open_model
    from secateur.models.model import Model, Settings
    from secateur.pipeline.compress import compress, save
    from secateur.pipeline.config import RunConfig
    from secateur.pipeline.context import RunContext
    from secateur.planning.plan import Plan
    from secateur.planning.planner import make_plan
    from secateur.planning.recipe import Recipe, read_recipe
    from secateur.planning.stage import Stage, StageResult
    from secateur.scoring.calibration_selection import select_calibration
    from secateur.scoring.evidence import score
    from secateur.structure.budget import Budget

_HOMES = {
    "AlphaPruning": "secateur.allocate.alpha",
    "Angular": "secateur.allocate.angular",
    "Armor": "secateur.methods.armor",
    "Auto": "secateur.methods.auto",
    "BlockDenseProjection": "secateur.methods.block_dense",
    "BlockShuffleProjection": "secateur.methods.block_shuffle",
    "CFSP": "secateur.methods.cfsp",
    "Budget": "secateur.structure.budget",
    "COMPOT": "secateur.methods.compot",
    "Calibration": "secateur.data.tokens",
    "CoSpaDi": "secateur.methods.cospadi",
    "DSFormer": "secateur.methods.dsformer",
    "EntropicInfluence": "secateur.allocate.influence",
    "FARMS": "secateur.allocate.farms",
    "FLAP": "secateur.methods.flap",
    "Fluctuation": "secateur.allocate.fluctuation",
    "Forms": "secateur.methods.forms",
    "GPTQ": "secateur.methods.gptq",
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
    "Model": "secateur.models.model",
    "MonarchProjection": "secateur.methods.monarch",
    "Nirvana": "secateur.methods.nirvana",
    "OBSPA": "secateur.methods.obspa",
    "PTQTP": "secateur.methods.ptqtp",
    "PlainWidth": "secateur.allocate.plain",
    "Plan": "secateur.planning.plan",
    "Questions": "secateur.evaluate.evaluator",
    "RTN": "secateur.methods.rtn",
    "Recipe": "secateur.planning.recipe",
    "RunConfig": "secateur.pipeline.config",
    "RunContext": "secateur.pipeline.context",
    "Stage": "secateur.planning.stage",
    "StageResult": "secateur.planning.stage",
    "Replace": "secateur.methods.replace",
    "SLEB": "secateur.methods.sleb",
    "SPDY": "secateur.allocate.spdy",
    "SVD": "secateur.methods.svd",
    "SVDLLM": "secateur.methods.svd_llm",
    "Settings": "secateur.models.model",
    "ShortGPT": "secateur.methods.shortgpt",
    "SliceGPT": "secateur.methods.slicegpt",
    "SparseGPT": "secateur.methods.sparsegpt",
    "Step": "secateur.methods.step",
    "Store": "secateur.calibration.collect",
    "Text": "secateur.data.tokens",
    "TwoThresholds": "secateur.allocate.nirvana",
    "Uniform": "secateur.allocate.uniform",
    "Wanda": "secateur.methods.wanda",
    "WandaSP": "secateur.methods.wanda_sp",
    "WeLore": "secateur.allocate.welore",
    "ZipLM": "secateur.methods.ziplm",
    "calibrate": "secateur.calibration.collect",
    "calibration_tokens": "secateur.data.tokens",
    "compress": "secateur.pipeline.compress",
    "judge_apart": "secateur.evaluate.evaluator",
    "make_plan": "secateur.planning.planner",
    "open_model": "secateur.models.loading",
    "save": "secateur.pipeline.compress",
    "score": "secateur.scoring.evidence",
    "export_dense": "secateur.export.checkpoint",
    "export_gguf": "secateur.export.gguf.export",
    "export_onnx": "secateur.export.onnx",
    "export_plain": "secateur.export.checkpoint",
    "read_recipe": "secateur.planning.recipe",
    "select_calibration": "secateur.scoring.calibration_selection",
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
    "Budget",
    "Calibration",
    "CoSpaDi",
    "DSFormer",
    "EntropicInfluence",
    "Fluctuation",
    "Forms",
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
    "RunConfig",
    "RunContext",
    "Settings",
    "ShortGPT",
    "SliceGPT",
    "SparseGPT",
    "Stage",
    "StageResult",
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
    from secateur.models.register import register

    register()


# transformers takes seconds to import and has no entry points to be found by, so the registration
# waits for it instead of pulling it in for `secateur --help`. It hangs on the package itself: its
# submodules import each other in circles, in the middle of which no class can be made.
wrapt.register_post_import_hook(_register, "transformers")
