"""Which methods gain something in the runtime that will read the result."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from secateur.methods.step import Step
from secateur.structure.budget import Runtime
from secateur.structure.runtime_limits import LIMITS
from secateur.structure.units import DEPTH, MATRICES, STREAM, Matrix, Unit
from secateur.utils.errors import InputError

if TYPE_CHECKING:
    from secateur.models.model import Model


def check_runtime(shapes: "Model", step: Step) -> None:
    """Refuse a method that gains nothing in the runtime asked for; reads no weights.

    Raises:
        InputError: what stands in the way, and what to change.
    """
    method, budget = step.method, step.budget
    limits = LIMITS.get(budget.runtime)
    if limits is None:
        return
    asked, llama = f"--for {budget.runtime}", budget.runtime.startswith("gguf")
    units = step.units(shapes)
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
    if budget.runtime == "vllm":
        _check_vllm(asked, shapes, step, units)
    if llama:
        _check_llama(asked, shapes, step, units)
    if method.kinds in (DEPTH, MATRICES):
        return
    if all(unit.fixed for unit in units):
        before = {u.name: u for u in method.units(shapes, budget.multiple_of) if not u.fixed}
        name, unit = next(iter(before.items()), ("it", units[0]))
        raise InputError(
            f"{asked} leaves {method.name} nothing to change: {name} has size {unit.size}, widths "
            f"are multiples of {limits.grain} ({limits.reason}), and attention keeps its widths. "
            f"{_finer(budget.runtime)}"
        )


def _check_vllm(asked: str, shapes: "Model", step: Step, units: Sequence[Unit]) -> None:
    """Stock shapes are all that it opens."""
    method = step.method
    if shapes.narrowed:
        raise InputError(
            f"{asked}: model {shapes.source!r} has shapes that stock classes don't open, and so "
            f"will what is made of it. Start from the original, or from what `secateur export "
            f"--to plain` makes of this one."
        )
    if step.budget.tier == "plain":
        return
    matrices = [unit for unit in units if isinstance(unit, Matrix)]
    if any(not unit.published for unit in matrices):
        raise InputError(
            f"{asked}: stock classes of this family keep attention in another layout than the one "
            f"that {method.name} works on, and vLLM opens stock shapes only. Leave --for out."
        )
    if method.kinds == DEPTH and any(unit.new_bias for unit in units):
        raise InputError(
            f"{asked}: {method.name} puts constants in the place of blocks, and vLLM opens stock "
            f"shapes only. Leave them out (--compensate 0)."
        )
    if method.kinds not in (DEPTH, MATRICES):
        raise InputError(
            f"{asked}: {method.name} gives every layer its own shapes, and vLLM opens stock shapes "
            f"only. Ask for --tier plain beside it, or take whole blocks away (shortgpt)."
        )


def _check_llama(asked: str, shapes: "Model", step: Step, units: Sequence[Unit]) -> None:
    from secateur.export.gguf.shapes import by_layer_obstacle, config_obstacle, family_of

    method = step.method
    said = config_obstacle(shapes.config)
    if said is not None:
        raise InputError(
            f"{asked}: {said}, and `secateur export --to gguf` would refuse the result. Leave "
            f"--for out; what --tier plain makes may be for llama.cpp's own converter."
        )
    obstacle = by_layer_obstacle(shapes.config)
    if obstacle is not None and step.budget.tier != "plain" and method.kinds != DEPTH:
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
