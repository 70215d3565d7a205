"""What compressing costs, as a ratio to the calibration forward pass of the same run.

    python benchmarks/cost.py MODEL CALIBRATION [--keep 0.8] [--repeats 3]

The compression is everything between the open model and the narrowed one: statistics, curves,
allocation, narrowing. Opening, writing and judging are left out.
"""

import argparse
import time
from statistics import median

import torch

from secateur.apply import narrow_block
from secateur.calibration import TOKENS_PER_BATCH, Store, calibrate
from secateur.evaluate.judge import quiet
from secateur.methods.modegpt import MoDeGPT
from secateur.model import open_model
from secateur.plan import make_plan, measure_curves
from secateur.text import Calibration, calibration_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    quiet()
    runs = [once(arguments) for _ in range(arguments.repeats)]
    print(f"{arguments.samples} × {arguments.length} tokens, median of {arguments.repeats} runs\n")
    print("| stage | seconds | of the forward pass |")
    print("|---|---|---|")
    forward = median(run["forward"] for run in runs)
    for stage in runs[0]:
        seconds = median(run[stage] for run in runs)
        print(f"| {stage} | {seconds:.2f} | {seconds / forward:.2f} |")


def once(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds by stage of one compression."""
    model, store = open_model(arguments.model), Store()
    calibration = Calibration(arguments.calibration, arguments.samples, arguments.length)
    tokens = calibration_tokens(calibration, model.tokenizer)
    method, seconds, last = MoDeGPT(keep=arguments.keep), {}, time.perf_counter()

    def lap(stage: str) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[stage], last = now - last, now

    rows = max(1, TOKENS_PER_BATCH // arguments.length)
    with torch.inference_mode():
        body = model.module.base_model  # the head takes no part in calibration
        body(input_ids=tokens.ids[:rows], use_cache=False)  # warm-up
        last = time.perf_counter()
        for start in range(0, len(tokens.ids), rows):
            body(input_ids=tokens.ids[start : start + rows], use_cache=False)
    lap("forward")
    calibrate(model, tokens, method.needs | method.allocator.needs, store)
    lap("statistics")
    evidence = measure_curves(model, method, store)
    lap("curves")
    plan = make_plan(model, method, evidence, calibration, tokens)
    lap("allocation")
    units = model.units(plan.multiple_of)
    for block in model.blocks:
        own = [unit for unit in units if unit.block == block.index]
        narrow_block(
            block, own, plan.sizes, method, store.get(block.index, method.needs, model.device)
        )
    lap("narrowing")
    seconds["compression"] = sum(v for stage, v in seconds.items() if stage != "forward")
    return seconds


if __name__ == "__main__":
    main()
