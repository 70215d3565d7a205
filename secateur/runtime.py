"""What the runtimes read: the sizes that units may take for one, and what it has no use for."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from secateur.errors import InputError
from secateur.units import DEPTH, MATRICES, STREAM, Heads, Matrix, Unit

if TYPE_CHECKING:
    from secateur.goal import Goal
    from secateur.methods.base import Method
    from secateur.model import Model

Runtime = Literal["transformers", "vllm", "gguf", "gguf-q4"]


@dataclass(frozen=True)
class Limits:
    """What sizes a runtime reads.

    Attributes:
        grain: MLP widths, and what the heads of a layer come to, are multiples of this.
        heads: whether layers may differ in their number of heads.
        reason: for the grain, in words.
    """

    grain: int
    heads: bool
    reason: str


#: transformers reads every size, as the checkpoint brings its own code
LIMITS: dict[Runtime, Limits] = {
    "vllm": Limits(64, False, "so that up to 8 devices share a width by multiples of 8"),
    "gguf": Limits(32, True, "the numbers that share a scale in Q8_0"),
    "gguf-q4": Limits(256, True, "the numbers that a block of Q4_K takes"),
}


def fitted(unit: Unit, runtime: Runtime) -> Unit:
    """A unit with only those sizes below today's that a runtime reads; it never goes altogether.

    Queries, keys and values keep their width: llama.cpp has one for all heads and layers, and vLLM
    takes the cache's from the config. Whole blocks may go everywhere.
    """
    limits = LIMITS.get(runtime)
    if limits is None or unit.kind in (*DEPTH, *MATRICES, *STREAM):
        return unit
    if isinstance(unit, Heads) and limits.heads:
        step = limits.grain // math.gcd(limits.grain, unit.group * unit.value)
    elif unit.kind == "mlp":
        step = math.lcm(unit.step, limits.grain)
    else:
        return replace(unit, least=unit.size)
    return replace(unit, step=step, least=min(unit.size, max(unit.least, step)))


def check_runtime(shapes: "Model", method: "Method", goal: "Goal") -> None:
    """Refuse a method that gains nothing in the runtime asked for; reads no weights.

    Raises:
        InputError: what stands in the way, and what to change.
    """
    limits = LIMITS.get(goal.runtime)
    if limits is None:
        return
    asked, llama = f"--for {goal.runtime}", goal.runtime.startswith("gguf")
    units = goal.units(method, shapes)
    if method.kinds == STREAM:
        raise InputError(
            f"{asked}: {method.name} slices the residual stream, and its shortcuts are read by "
            f"transformers alone. Choose a method that narrows, or leave --for out."
        )
    matrices = [unit for unit in units if isinstance(unit, Matrix)]
    if matrices and llama:
        raise InputError(
            f"{asked}: llama.cpp reads none of the forms of {method.name}; its matrices would be "
            f"multiplied out, and nothing gained. Choose a method that narrows, and few bits on "
            f"export (--type q4_k_m)."
        )
    if any(not form.stock for unit in matrices for form in unit.forms):
        raise InputError(
            f"{asked}: the forms of {method.name} are layers of our own, which vLLM is not known "
            f"to run. Choose a method that narrows, rtn or gptq, or leave --for out."
        )
    if llama:
        _check_llama(asked, method, shapes, goal, units)
    if method.kinds in (DEPTH, MATRICES):
        return
    if all(unit.fixed for unit in units):
        before = {u.name: u for u in method.units(shapes, goal.multiple_of) if not u.fixed}
        name, unit = next(iter(before.items()), ("it", units[0]))
        raise InputError(
            f"{asked} leaves {method.name} nothing to change: {name} has size {unit.size}, widths "
            f"are multiples of {limits.grain} ({limits.reason}), and attention keeps its widths. "
            f"{_finer(goal.runtime)}"
        )


def _check_llama(
    asked: str, method: "Method", shapes: "Model", goal: "Goal", units: Sequence[Unit]
) -> None:
    from secateur.gguf.shapes import by_layer_obstacle, family_of

    obstacle = by_layer_obstacle(shapes.config)
    if obstacle is not None and goal.tier != "plain" and method.kinds != DEPTH:
        raise InputError(
            f"{asked}: {obstacle}. Ask for --tier plain, which gives all MLPs one width, or take "
            f"whole blocks away (shortgpt)."
        )
    biased = [unit for unit in units if unit.new_bias and not unit.fixed]
    if biased and family_of(shapes.config) == "qwen3":
        raise InputError(
            f"{asked}: {method.name} gives {biased[0].name} a bias, and llama.cpp's architectures "
            f"for Qwen3 have none. Leave them out (--compensate 0), or choose another method."
        )


def _finer(runtime: Runtime) -> str:
    if runtime == "gguf-q4":
        return "--for gguf asks for multiples of 32."
    return "Take whole blocks away (shortgpt), or leave --for out."
