"""How well predicted loss orders plans: rank correlation with the measured divergence.

    python benchmarks/prediction.py MODEL CALIBRATION HELD [--plans 30] [--keep 0.7]

Three sets of plans: of keeps spread over 0.4 … 0.95, of random sizes at one keep, and good ones at
that keep. Random sizes are shares drawn evenly from 0.4 … 1 for every unit, fitted to the budget.
The others are the knapsack's plans after the losses of all units were multiplied by random
factors (log-normal, the logarithm with a standard deviation of 1), so the good ones differ in where
they spend but little in what they lose. Every plan is carried out by the default method, whole, and
judged by the KL divergence of its output from the dense model's, in nats a token, on text that
calibration never saw.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from scipy.stats import spearmanr

from secateur import Auto, Calibration, Model, Store, calibrate, calibration_tokens, score
from secateur.allocate.base import Evidence, fit
from secateur.allocate.knapsack import Knapsack
from secateur.apply.sequential import narrow_blocks
from secateur.data.tokens import Tokens, contiguous, read_documents, token_stream
from secateur.evaluate.evaluator import quiet
from secateur.models.loading import open_model
from secateur.structure.costs import Prices, counted
from secateur.structure.error_curve import Curve
from secateur.structure.units import Unit

LENGTH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("held")
    parser.add_argument("--plans", type=int, default=30)
    parser.add_argument("--keep", type=float, default=0.7)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--multiple-of", type=int, default=8)
    arguments = parser.parse_args()
    quiet()
    model, store = open_model(arguments.model), Store()
    tokens = calibration_tokens(Calibration(arguments.calibration, 128, LENGTH), model.tokenizer)
    method = Auto()
    calibrate(model, tokens, method.needs, store)
    evidence = score(model, method, store, tokens)
    held = contiguous(
        token_stream(read_documents(arguments.held), model.tokenizer), LENGTH, arguments.windows
    )
    dense = log_probabilities(model, held)
    generator = np.random.default_rng(0)
    number, keep = arguments.plans, arguments.keep
    print("| plans | number | measured divergence | rank correlation |\n|---|---|---|---|")
    for title, keeps, sizes_of in (
        ("keep 0.40 to 0.95", np.linspace(0.4, 0.95, number), good),
        (f"keep {keep:g}, random sizes", np.full(number, keep), at_random),
        (f"keep {keep:g}, good ones", np.full(number, keep), good),
    ):
        predicted, measured = [], []
        for share in keeps:
            small = open_model(arguments.model)
            units = small.units(arguments.multiple_of)
            prices = counted(units, "parameters", small.stored.itemsize)
            sizes = sizes_of(units, prices, evidence, float(share), generator)
            loss = predicted_loss(evidence.losses, sizes)
            list(narrow_blocks(small, method, units, sizes, tokens, store))
            predicted.append(loss)
            measured.append(divergence(dense, log_probabilities(small, held)))
            print(f"{share:.3f} {loss:.4f} {measured[-1]:.4f}", file=sys.stderr, flush=True)
        found = spearmanr(predicted, measured).statistic
        print(
            f"| {title} | {len(predicted)} | {min(measured):.3f} … {max(measured):.3f} | "
            f"{found:.3f} |",
            flush=True,
        )


def good(
    units: list[Unit],
    prices: Prices,
    evidence: Evidence,
    keep: float,
    generator: np.random.Generator,
) -> dict[str, int]:
    """Sizes by the knapsack on disturbed losses."""
    assert evidence.losses is not None
    factors = np.exp(generator.standard_normal(len(units)))
    disturbed = {
        unit.name: Curve(tuple(float(factor) * e for e in evidence.losses[unit.name].errors))
        for unit, factor in zip(units, factors, strict=True)
    }
    return Knapsack().allocate(units, replace(evidence, losses=disturbed), prices, keep)


def at_random(
    units: list[Unit],
    prices: Prices,
    evidence: Evidence,
    keep: float,
    generator: np.random.Generator,
) -> dict[str, int]:
    """Random sizes that spend the budget."""
    ideal = {unit.name: unit.size * generator.uniform(0.4, 1) for unit in units}
    allowed = {unit.name: unit.sizes() for unit in units}
    return fit(units, allowed, ideal, prices, prices.budget(units, keep))


def predicted_loss(losses: Mapping[str, Curve], sizes: Mapping[str, int]) -> float:
    """The sum of the units' losses, queries and keys of a gone attention left aside."""
    return sum(
        losses[name].at(size)
        for name, size in sizes.items()
        if not (name.endswith("query_key") and not sizes[name.replace("query_key", "value_output")])
    )


def log_probabilities(model: Model, tokens: Tokens) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat(
            [
                model.module(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
                for ids in tokens.ids.split(8)
            ]
        )


def divergence(dense: torch.Tensor, found: torch.Tensor) -> float:
    return float((dense.exp() * (dense - found)).sum(-1).mean())


if __name__ == "__main__":
    main()
