"""What the runtimes read: the sizes that units may take for one."""

from dataclasses import dataclass

from secateur.structure.budget import Runtime
from secateur.structure.units import Unit


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
    return unit if limits is None else unit.for_runtime(limits.grain, limits.heads)
