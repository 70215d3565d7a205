"""What compressing costs, as a ratio to the calibration forward pass of the same run.

    python benchmarks/cost.py MODEL CALIBRATION [--keep 0.8] [--repeats 3] [--method auto]

The compression is everything between the open model and the narrowed one: statistics, scores
(curves and measured losses), allocation, narrowing with all refits. Opening, writing and judging
are left out.
"""

import argparse
import time
from statistics import median

import torch

from secateur import (
    Budget,
    Calibration,
    Step,
    Store,
    calibrate,
    calibration_tokens,
    make_plan,
    open_model,
    score,
)
from secateur.apply.sequential import narrow_blocks
from secateur.calibration.layer_stream import TOKENS_PER_BATCH
from secateur.evaluate.evaluator import quiet
from secateur.methods import METHODS, method_class


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("--method", default="auto", choices=METHODS)
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    quiet()
    runs = [once(arguments) for _ in range(arguments.repeats)]
    print(
        f"`{arguments.method}` at keep {arguments.keep:g}, {arguments.samples} × "
        f"{arguments.length} tokens, median of {arguments.repeats} runs\n"
    )
    print("| stage | seconds | of the forward pass |")
    print("|---|---|---|")
    for stage in runs[0]:
        seconds = median(run[stage] for run in runs)
        ratio = median(run[stage] / run["forward pass"] for run in runs)
        print(f"| {stage} | {seconds:.2f} | {ratio:.2f} |")


def once(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds by stage of one compression."""
    model, store = open_model(arguments.model), Store()
    calibration = Calibration(arguments.calibration, arguments.samples, arguments.length)
    tokens = calibration_tokens(calibration, model.tokenizer)
    method = method_class(arguments.method)()
    seconds: dict[str, float] = {}
    rows = max(1, TOKENS_PER_BATCH // arguments.length)
    with torch.inference_mode():
        body = model.module.base_model  # the head takes no part in calibration
        body(input_ids=tokens.ids[:rows], use_cache=False)  # warm-up
        last = time.perf_counter()
        for start in range(0, len(tokens.ids), rows):
            body(input_ids=tokens.ids[start : start + rows], use_cache=False)

    def lap(stage: str) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[stage], last = now - last, now

    lap("forward pass")
    calibrate(model, tokens, method.needs, store)
    lap("statistics")
    evidence = score(model, method, store, tokens)
    lap("scores")
    budget = Budget(keep=arguments.keep)
    plan = make_plan(model, method, evidence, calibration, tokens, budget=budget)
    lap("allocation")
    units = Step.of(method, budget).units(model)
    list(narrow_blocks(model, method, units, plan.sizes, tokens=tokens, store=store))
    lap("narrowing")
    seconds["compression"] = sum(v for stage, v in seconds.items() if stage != "forward pass")
    return seconds


if __name__ == "__main__":
    main()
