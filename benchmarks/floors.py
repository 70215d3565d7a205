"""The least work of each stage of a compression: operations and bytes, by docs/performance.md."""

from dataclasses import dataclass

from secateur.calibration.layer_stream import TOKENS_PER_BATCH
from secateur.calibration.pair_scores import PairScores
from secateur.scoring.divergence import PASSES

ITERATIONS = 3  # of auto's Gauss-Newton step


@dataclass(frozen=True)
class Shape:
    """A Llama and its calibration text."""

    blocks: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    vocabulary: int
    samples: int
    length: int

    @property
    def tokens(self) -> int:
        return self.samples * self.length

    @property
    def keys(self) -> int:
        """The width of all keys of a block, and of all values."""
        return self.hidden // self.heads * self.kv_heads

    @property
    def matrices(self) -> int:
        """Numbers in the matrices of a block."""
        return self.hidden * (2 * self.hidden + 2 * self.keys + 3 * self.mlp)


@dataclass(frozen=True)
class Work:
    """Operations in the model's number format and in float64, and bytes moved in memory."""

    model: float = 0.0
    double: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.model + other.model, self.double + other.double, self.bytes + other.bytes)

    def __mul__(self, times: float) -> "Work":
        return Work(self.model * times, self.double * times, self.bytes * times)

    def seconds(self, rates: dict[str, float]) -> float:
        """At the rates of a machine; computing hides moving, or the other way round."""
        computing = self.model / rates["model"] + self.double / rates["double"]
        return max(computing, self.bytes / rates["bytes"])


def floors(shape: Shape, method: str, keep: float, itemsize: int) -> dict[str, Work]:
    """The work of every stage, all blocks together."""
    one = {"modegpt": modegpt, "auto": auto}[method](shape, keep, itemsize)
    return {stage: work * shape.blocks for stage, work in one.items()}


def forward(shape: Shape, itemsize: int, tokens: float | None = None) -> Work:
    """A block over all tokens: two operations a weight, and half of all pairs of tokens."""
    count = shape.tokens if tokens is None else tokens
    pairs = 2 * count * shape.length * shape.hidden
    states = 2 * count * shape.hidden * itemsize
    return Work(2 * count * shape.matrices + pairs, 0, shape.matrices * itemsize + states)


def gram(shape: Shape, width: float) -> Work:
    """Of activations: one operation for each of n² numbers; the sum is read and written a batch."""
    batches = -(-shape.tokens // TOKENS_PER_BATCH)
    return Work(shape.tokens * width**2, 0, batches * 2 * 8 * width**2 / 2)


def modegpt(shape: Shape, keep: float, itemsize: int) -> dict[str, Work]:
    n, h, k, head = shape.mlp, shape.hidden, keep * shape.mlp, shape.hidden / shape.heads
    statistics = gram(shape, n) + Work(2 * shape.tokens * shape.keys * head, 0, 4 * n**2)
    leverage = Work(0, n**3)
    return {
        "calibration_forward": forward(shape, itemsize),
        "calibrate": forward(shape, itemsize) + statistics,
        "curves": leverage + Work(0, n**3 / 3 + n**2 * h, 5 * 8 * n**2),
        "apply": leverage + Work(0, k**3 / 3 + 2 * k * n * h + 2 * k**2 * h, 5 * 8 * n**2),
    }


def auto(shape: Shape, keep: float, itemsize: int) -> dict[str, Work]:
    n, h, k, width = shape.mlp, shape.hidden, keep * shape.mlp, shape.hidden / shape.heads
    tokens, scored = shape.tokens, min(shape.tokens, PairScores.most_tokens)
    pairs = scored * shape.heads * (shape.length * width * (width + 1) + 2 * width**3)
    statistics = gram(shape, n) + gram(shape, h) + Work(pairs, 0, 4 * (n**2 + h**2))
    once, smaller = forward(shape, itemsize), forward(shape, itemsize) * keep
    removed = 1 - keep**3  # of the elimination's n³, as it ends early
    solve = Work(0, n**3 + 5 * n**2 * h, 7 * 8 * n**2)  # factor, inverse, fit, its products
    refits = sum((share * n) ** 3 / 3 + 2 * (share * n) ** 2 * h for share in (1 / 3, 2 / 3))
    head = Work(2 * PASSES * tokens * 2 * h * shape.vocabulary / shape.blocks)
    cross = Work(2 * tokens * (h + k) * h)
    steps = Work((9 + 6 * ITERATIONS) * 2 * tokens * h * k)
    refit = Work(0, k**3 / 3 + 2 * k**2 * h)
    return {
        "calibration_forward": once,
        "calibrate": once + statistics,
        "curves": solve + Work(0, n**3 + refits) + once * PASSES + head,
        "apply": once
        + smaller * 2
        + gram(shape, h)
        + gram(shape, n)
        + gram(shape, k)
        + cross
        + solve
        + Work(0, removed * n**3)
        + steps
        + refit * 2,
    }
