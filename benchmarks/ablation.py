"""What each ingredient of the default method is worth: the method without it, or with an older one.

    python benchmarks/ablation.py MODEL CALIBRATION HELD [--keeps 0.8 0.6] [--multiple-of 8]

Perplexity on held-out text, one seed. Where an ingredient has a part in the scores, they are
measured anew with what takes its place.
"""

import argparse
from dataclasses import dataclass, replace
from typing import ClassVar

from secateur import (
    Auto,
    Budget,
    Calibration,
    Store,
    calibrate,
    calibration_tokens,
    make_plan,
    score,
)
from secateur.allocate.base import Allocator
from secateur.allocate.influence import EntropicInfluence
from secateur.allocate.knapsack import Knapsack
from secateur.allocate.plain import PlainWidth
from secateur.allocate.uniform import Uniform
from secateur.apply.sequential import narrow_blocks
from secateur.calibration.needs import BlockStatistics, Need, Needs
from secateur.data.tokens import contiguous, read_documents, token_stream
from secateur.evaluate.evaluator import quiet
from secateur.evaluate.perplexity import perplexity
from secateur.methods.base import Method, Solution
from secateur.methods.cr import CR
from secateur.methods.head_svd import HeadSVD
from secateur.methods.nystrom import Nystrom
from secateur.methods.step import Step
from secateur.models.block import Block
from secateur.models.loading import open_model
from secateur.structure.units import Unit

LENGTH, WINDOWS = 256, 128
DEFAULT = Auto()
ALL = Auto.needs | {Needs.QUERY_ENERGY, Needs.KEY_ENERGY, Needs.VALUE_GRAM}


@dataclass(frozen=True)
class Older(Auto):
    """The default with one local solver of MoDeGPT's in place of its own."""

    kind: str = ""
    needs: ClassVar[frozenset[Need]] = ALL

    def solve(self, unit: Unit, block: Block, statistics: BlockStatistics) -> Solution:
        if unit.kind != self.kind:
            return super().solve(unit, block, statistics)
        older = {
            "mlp": Nystrom(1e-3, 1e-6),
            "query_key": CR(),
            "value_output": HeadSVD(1e-6),
        }[self.kind]
        return older.solve(unit, block, statistics)


@dataclass(frozen=True)
class OnePass(Method):
    """Another method's solutions, from the statistics of the dense model alone."""

    inner: Auto = DEFAULT

    name: ClassVar[str] = "one pass"
    needs: ClassVar[frozenset[Need]] = ALL

    @property
    def allocator(self) -> Allocator:
        return self.inner.allocator

    def solve(self, unit: Unit, block: Block, statistics: BlockStatistics) -> Solution:
        return self.inner.solve(unit, block, statistics)


@dataclass(frozen=True)
class Present(Knapsack):
    """The knapsack without size 0."""

    def choices(self, unit: Unit) -> list[int]:
        return [size for size in unit.sizes() if size > 0]


@dataclass(frozen=True)
class Variant:
    """A method, what spends its budget, and whether blocks see those before them."""

    method: Auto
    allocator: Allocator
    sequential: bool = True


VARIANTS = {
    "auto": Variant(Auto(), Knapsack()),
    "without the Gauss-Newton step": Variant(Auto(iterations=0), Knapsack()),
    "without propagation (and the step)": Variant(Auto(), Knapsack(), sequential=False),
    "… and Nyström by leverage for the MLP": Variant(
        Older(kind="mlp"), Knapsack(), sequential=False
    ),
    "… and SVD of unmixed values": Variant(
        Older(kind="value_output"), Knapsack(), sequential=False
    ),
    "without whole units going": Variant(Auto(), Present()),
    "CR for query/key": Variant(Older(kind="query_key"), Knapsack()),
    "influence instead of knapsack": Variant(Auto(), EntropicInfluence()),
    "uniform instead of knapsack": Variant(Auto(), Uniform()),
    "tier plain": Variant(Auto(), PlainWidth()),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("held")
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.8, 0.6])
    parser.add_argument("--multiple-of", type=int, default=8)
    arguments = parser.parse_args()
    quiet()
    model, store = open_model(arguments.model), Store()
    calibration = Calibration(arguments.calibration, 128, LENGTH)
    tokens = calibration_tokens(calibration, model.tokenizer)
    held = contiguous(
        token_stream(read_documents(arguments.held), model.tokenizer), LENGTH, WINDOWS
    )
    calibrate(model, tokens, ALL, store)
    evidence = {}
    print(f"dense {perplexity(model.module, held):.2f}\n")
    print("| variant | " + " | ".join(f"keep {keep:g}" for keep in arguments.keeps) + " |")
    print("|---" * (1 + len(arguments.keeps)) + "|", flush=True)
    for name, variant in VARIANTS.items():
        key = replace(variant.method, iterations=0)
        if key not in evidence:
            evidence[key] = score(model, variant.method, store, tokens)
        cells = []
        for keep in arguments.keeps:
            small, method = open_model(arguments.model), variant.method
            step = Step.of(
                method, Budget(keep=keep, multiple_of=arguments.multiple_of), variant.allocator
            )
            try:
                plan = make_plan(
                    small,
                    method,
                    evidence[key],
                    calibration,
                    tokens,
                    budget=step.budget,
                    allocator=step.allocator,
                )
            except ValueError:
                cells.append("out of reach")
                continue
            narrowing = method if variant.sequential else OnePass(inner=method)
            given = (step.units(small), plan.sizes)
            list(narrow_blocks(small, narrowing, *given, tokens=tokens, store=store))
            cells.append(f"{perplexity(small.module, held):.2f}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
