"""How much the choice, the amount and the kind of calibration text matter, at one budget.

    python benchmarks/calibration.py MODEL CALIBRATION HELD [OTHER ...] [--method flap]
        [--keep 0.8] [--samples 8 32 128] [--seeds 0 1 2] [--rows FILE]

Prints a Markdown section: perplexity on HELD for every way to choose windows of CALIBRATION and
every number of them, and at the largest number for random windows of each OTHER text. What is set
aside of the OTHER texts is judged on, too. Rows that FILE already holds are not measured again;
one file serves several methods and budgets.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import mean

from rows import Row, add, read

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
    select_calibration,
)
from secateur.apply.sequential import narrow_blocks
from secateur.data.tokens import (
    SELECTIONS,
    SET_ASIDE,
    Tokens,
    contiguous,
    read_documents,
    token_stream,
)
from secateur.evaluate.evaluator import quiet
from secateur.evaluate.perplexity import perplexity
from secateur.methods import METHODS, method_class


def main() -> None:
    arguments = parsed()
    quiet()
    print(section(arguments, gathered(arguments)))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("held")
    parser.add_argument("others", nargs="*", metavar="other")
    parser.add_argument("--method", default="flap", choices=list(METHODS))
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--selects", nargs="+", default=SELECTIONS, choices=SELECTIONS)
    parser.add_argument("--samples", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=128, help="of each text to judge on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--multiple-of", type=int, default=8)
    parser.add_argument("--rows", type=Path, help="JSON lines; measured rows are added")
    return parser.parse_args()


def gathered(arguments: argparse.Namespace) -> list[Row]:
    """A row for every text, choice, amount and seed, and one for the dense model.

    Texts are known by the names of their files.
    """
    rows = read(arguments.rows)
    jobs = [
        (arguments.calibration, select, samples, seed)
        for samples in arguments.samples
        for select in arguments.selects
        for seed in arguments.seeds
    ]
    most = max(arguments.samples)
    sources = (arguments.calibration, *arguments.others) if arguments.others else ()
    jobs += [(source, "none", most, seed) for source in sources for seed in arguments.seeds]
    texts = judged_on(arguments)
    for source, select, samples, seed in [(None, "none", 0, 0), *jobs]:
        key = asked(arguments, source) | {"select": select, "samples": samples, "seed": seed}
        if any(
            key.items() <= row.items() and texts.keys() <= row["perplexity"].keys() for row in rows
        ):
            continue
        row = key | measured(arguments, source, select, samples, seed, texts)
        rows.append(row)
        add(arguments.rows, [row])
        print(json.dumps(row), file=sys.stderr, flush=True)
    return [row for row in rows if texts.keys() <= row["perplexity"].keys()]


def asked(arguments: argparse.Namespace, source: str | None) -> Row:
    """What a row is of, beside the choice and number of windows; of no text, the dense model."""
    shape = {"length": arguments.length, "windows": arguments.windows}
    row: Row = {"model": Path(arguments.model).name, "source": None} | shape
    if source is None:
        return row
    how = {"method": arguments.method, "keep": arguments.keep, "multiple_of": arguments.multiple_of}
    return row | how | {"source": Path(source).name}


def judged_on(arguments: argparse.Namespace) -> dict[str, Tokens]:
    """By name, HELD, and of the other texts the part that calibration never sees."""
    tokenizer, length = open_model(arguments.model).tokenizer, arguments.length
    found = {}
    for source in (arguments.held, *arguments.others):
        stream = token_stream(read_documents(source), tokenizer)
        start = 0 if source == arguments.held else int(SET_ASIDE * len(stream))
        found[Path(source).name] = contiguous(stream[start:], length, arguments.windows)
    return found


def measured(
    arguments: argparse.Namespace,
    source: str | None,
    select: str,
    samples: int,
    seed: int,
    texts: dict[str, Tokens],
) -> Row:
    """Perplexity on all texts of the model as narrowed by one calibration, or of the dense one."""
    model = open_model(arguments.model)
    row: Row = {}
    if source is not None:
        method = method_class(arguments.method)()
        budget = Budget(keep=arguments.keep, multiple_of=arguments.multiple_of)
        step = Step.of(method, budget)
        allocator = step.allocator
        calibration = Calibration(source, samples, arguments.length, seed, select)
        calibration = select_calibration(model, calibration, method, budget)
        tokens, store = calibration_tokens(calibration, model.tokenizer), Store()
        calibrate(model, tokens, method.needs | allocator.needs, store)
        evidence = score(model, method, store, tokens, allocator)
        plan = make_plan(model, method, evidence, calibration, tokens, budget=budget)
        given = (step.units(model), plan.sizes)
        list(narrow_blocks(model, method, *given, tokens=tokens, store=store))
        row["reached"] = plan.budget.reached
    found = {name: perplexity(model.module, tokens) for name, tokens in texts.items()}
    return row | {"perplexity": found}


def section(arguments: argparse.Namespace, rows: list[Row]) -> str:
    """A table of choices and amounts, one of texts."""
    seeds, held = " ".join(map(str, arguments.seeds)), Path(arguments.held).name
    of_dense = asked(arguments, None).items()
    dense = next(row["perplexity"] for row in rows if of_dense <= row.items())
    text = Path(arguments.calibration).name

    def own(source: str, select: str, samples: int) -> list[Row]:
        wanted = asked(arguments, source) | {"select": select, "samples": samples}
        found = [row for row in rows if wanted.items() <= row.items()]
        return [row for row in found if row["seed"] in arguments.seeds]

    def cell(source: str, select: str, samples: int, judged: str) -> str:
        found = [row["perplexity"][judged] for row in own(source, select, samples)]
        return f"{mean(found):.2f} ({min(found):.2f}–{max(found):.2f})"

    lines = [
        f"### {Path(arguments.model).name}, {arguments.method} at keep {arguments.keep:g}",
        "",
        f"Windows of {arguments.length} tokens of `{text}`, perplexity on {arguments.windows} × "
        f"{arguments.length} tokens of `{held}` (dense {dense[held]:.2f}), mean over seeds {seeds} "
        "with the range in parentheses. Other texts are judged on behind four fifths of them.",
        "",
        "| choice | " + " | ".join(f"{n} windows" for n in arguments.samples) + " |",
        "|---" * (len(arguments.samples) + 1) + "|",
    ]
    for select in arguments.selects:
        cells = [cell(text, select, n, held) for n in arguments.samples]
        lines.append(f"| {select} | " + " | ".join(cells) + " |")
    if arguments.others:
        most, others = max(arguments.samples), [Path(other).name for other in arguments.others]
        names = [f"`{judged}`" for judged in (held, *others)]
        lines += ["", f"{most} random windows of each text, judged on several:", ""]
        lines += ["| calibrated on | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for source in (text, *others):
            cells = [cell(source, "none", most, judged) for judged in (held, *others)]
            lines.append(f"| `{source}` | " + " | ".join(cells) + " |")
        values = [f"{dense[judged]:.2f}" for judged in (held, *others)]
        lines.append("| dense | " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
