"""What the runtimes read: the sizes that units may take for one."""

import math
from dataclasses import dataclass, replace

from secateur.structure.budget import Runtime
from secateur.structure.units import DEPTH, MATRICES, STREAM, Heads, Unit


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
