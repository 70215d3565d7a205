"""What compressing encoders costs: a small BERT and a small ViT, trained here.

    python benchmarks/encoders.py TEXT_CALIBRATION TEXT_HELD [--keeps 0.8 0.6 0.4] [--models FOLDER]

The BERT is trained on the first text to find hidden tokens, with a word-piece tokenizer trained on
the same text; the ViT on two thirds of scikit-learn's digits, images of 8 × 8 that its processor
enlarges. That takes some minutes each on one core, once: both are kept in FOLDER. Both are then
calibrated on what they were trained on and judged on the rest, dense beside compressed.
"""

import argparse
import hashlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from platformdirs import user_cache_path
from sklearn.datasets import load_digits
from tokenizers import BertWordPieceTokenizer
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from secateur import (
    Budget,
    Calibration,
    InputError,
    Step,
    Store,
    Text,
    calibrate,
    make_plan,
    open_model,
    score,
)
from secateur.apply.sequential import narrow_blocks
from secateur.data.tasks import use_of
from secateur.data.tokens import calibration_stream
from secateur.evaluate.agreement import agreement, outputs
from secateur.evaluate.evaluator import quiet
from secateur.evaluate.perplexity import answered
from secateur.methods import METHODS, method_class

CHOSEN = ("auto", "modegpt", "flap", "wanda-sp", "ziplm", "sleb")
LENGTH = 64
SIDE = 16
STEPS = 3000  # of BERT's training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("calibration")
    parser.add_argument("held")
    parser.add_argument("--methods", nargs="+", default=CHOSEN, choices=METHODS)
    parser.add_argument("--keeps", nargs="+", type=float, default=(0.8, 0.6, 0.4))
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--models", type=Path, default=user_cache_path("secateur") / "encoders")
    arguments = parser.parse_args()
    quiet()
    text, folder = arguments.calibration, arguments.models
    digest = hashlib.sha256(Path(text).read_bytes()).hexdigest()[:8]
    bert = kept(folder / f"bert-{digest}", lambda place: train_bert(place, text))
    images = kept(folder / "digits", write_digits)
    vit = kept(folder / "vit", lambda place: train_vit(place, images / "calibration"))
    print("| model | method | keep | reached | right | perplexity | first choice kept | KL, nats |")
    print("|---|---|---|---|---|---|---|---|")
    judged = [
        judge(bert, "BERT", text, arguments.held, arguments),
        judge(vit, "ViT", str(images / "calibration"), str(images / "held"), arguments),
    ]
    names = [Path(source).name for source in (text, arguments.held)]
    print(
        f"\nCalibrated on {arguments.samples} windows of {LENGTH} tokens of `{names[0]}`, or as "
        f"many digits; judged on {judged[0]} of `{names[1]}`, or on {judged[1]}. Of images, "
        f"perplexity is that of the class."
    )


def judge(
    folder: Path, name: str, source: str, held_source: str, arguments: argparse.Namespace
) -> str:
    """Print a row for the dense model and one for every method and budget.

    Gives back what they are judged on.
    """
    model, record = open_model(folder), Calibration(source, arguments.samples, LENGTH)
    use, reader = model.use, model.tokenizer
    tokens = use.calibration(record, reader)
    held = use.held(Text("held", held_source), reader, LENGTH, 1000)
    dense = outputs(model, held)
    value, right = answered(model, held)
    print(f"| {name} | dense | | | {right:.1%} | {value:.2f} | | |", flush=True)
    for method_name in arguments.methods:
        made = method_class(method_name)()
        if made.obstacle(model) is not None:
            continue
        store = Store()
        calibrate(model, tokens, made.needs | made.allocator.needs, store)
        evidence = score(model, made, store, tokens)
        for keep in arguments.keeps:
            method, small = method_class(method_name)(), open_model(folder)
            budget = Budget(keep=keep)
            try:
                plan = make_plan(
                    small, method, evidence, record, tokens, budget=budget, store=store
                )
            except InputError as error:
                if "out of reach" not in str(error):
                    raise
                print(f"| {name} | {method.name} | {keep:g} | out of reach | | | | |", flush=True)
                continue
            given = (Step.of(method, budget).units(small), plan.sizes)
            list(narrow_blocks(small, method, *given, tokens=tokens, store=store))
            value, right = answered(small, held)
            found = agreement(dense, outputs(small, held))
            print(
                f"| {name} | {method.name} | {keep:g} | {plan.budget.reached:.2f} | {right:.1%} | "
                f"{value:.2f} | {found['top1']:.1%} | {found['kl']:.3f} |",
                flush=True,
            )
    return f"{use.amount(held):,} {use.counts}"


def kept(folder: Path, make: Callable[[Path], None]) -> Path:
    """A folder that is made once, and appears when it is whole."""
    if not folder.exists():
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        make(partial)
        partial.rename(folder)
    return folder


def write_digits(folder: Path) -> None:
    """Every third digit is held back."""
    digits = load_digits()
    for number, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        own = folder / ("held" if number % 3 == 2 else "calibration") / str(digit)
        own.mkdir(parents=True, exist_ok=True)
        grey = torch.from_numpy(pixels * 255 / 16).round().to(torch.uint8)
        Image.fromarray(grey.numpy()).convert("RGB").save(own / f"{number}.png")


def train_vit(folder: Path, images: Path) -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=SIDE,
        patch_size=4,
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        id2label={i: str(i) for i in range(10)},
        label2id={str(i): i for i in range(10)},
    )
    model = ViTForImageClassification(config)
    processor = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})
    every = use_of(config).held(Text("digits", str(images)), processor, 0, 10**6)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        given = every[torch.randint(len(every), (64,), generator=generator).tolist()]
        return model(pixel_values=given.ids, labels=given.labels).loss

    train(model, loss, 600, 1e-3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def train_bert(folder: Path, text: str) -> None:
    """Hidden tokens teach little at a time, and a model may learn no more than how common each is.

    So windows are short at first, positions begin as waves, and tokens that are seen are to be
    found, too.
    """
    torch.manual_seed(0)
    pieces = BertWordPieceTokenizer(lowercase=True)
    pieces.train([text], vocab_size=1024, show_progress=False)
    pieces.save_model(str(folder))
    reader = BertTokenizerFast.from_pretrained(folder)
    config = BertConfig(
        vocab_size=len(reader),
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        initializer_range=0.1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForMaskedLM(config)
    angles = torch.arange(LENGTH)[:, None] * 10000 ** (-torch.arange(48) / 48)
    positions = model.bert.embeddings.position_embeddings.weight
    positions.data = 0.2 * torch.cat((angles.sin(), angles.cos()), 1)
    stream = calibration_stream(Calibration(text), reader)
    specials = torch.tensor([reader.cls_token_id, reader.sep_token_id])

    def loss(step: int, generator: torch.Generator) -> Tensor:
        inside = (6, 14, 30, LENGTH - 2)[4 * step // STEPS]
        rows = 1000 // inside
        starts = torch.randint(len(stream) - inside, (rows, 1), generator=generator)
        ids = stream[starts + torch.arange(inside)]
        first, last = specials.expand(rows, 2).split(1, 1)
        ids = torch.cat((first, ids, last), 1)
        hidden = torch.rand(ids.shape, generator=generator) < 0.2
        hidden[:, [0, -1]] = False
        shift = torch.randint(LENGTH - inside - 1, (rows, 1), generator=generator)
        logits = model(
            input_ids=torch.where(hidden, reader.mask_token_id, ids),
            position_ids=shift + torch.arange(inside + 2),
        ).logits
        seen = nn.functional.cross_entropy(logits[~hidden], ids[~hidden])
        return nn.functional.cross_entropy(logits[hidden], ids[hidden]) + 0.3 * seen

    train(model, loss, STEPS, 2e-3)
    model.save_pretrained(folder)
    reader.save_pretrained(folder)


def train(
    model: nn.Module,
    loss: Callable[[int, torch.Generator], Tensor],
    steps: int,
    rate: float,
) -> None:
    """AdamW with a warm-up, then a fall to nothing."""
    model.train()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    for step in range(steps):
        found = loss(step, generator)
        optimizer.zero_grad()
        found.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            name = type(model).__name__
            print(f"{name} {step} {found.item():.3f}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
