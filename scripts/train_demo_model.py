"""Train the small Llama that the package carries, on the documentation text of CPython itself.

Needs no network: the text is read from the Python installation that runs this script (see
``secateur/data/bundled.py``). Takes about half an hour on two CPU cores.

    PYTHONPATH=. python scripts/train_demo_model.py
"""

import argparse
import json
import math
import platform
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from secateur.data import bundled

WINDOW = 256
VOCABULARY = 2048
README = """\
# Demo model

A very small Llama ({parameters:,} parameters, {layers} layers, hidden size {hidden}, {heads} query
heads and {kv_heads} key/value heads, gated SiLU MLP, tied embeddings, {vocabulary} byte-level BPE
tokens) for trying the package without a network. It writes sentences that look like Python's
documentation; it knows nothing and is fit for nothing but demonstrations and tests.

- Trained on: the `train` split of `secateur/data/bundled.py`, that is the language reference topics
  and the docstrings and comments of the standard library of CPython {python}
  ({tokens:,} tokens, seen {epochs:.1f} times on average).
- Trained by: `{command}`
  ({taken}).
- Perplexity on the `held` split of the same text, windows of {window} tokens, weights in bfloat16
  and arithmetic in float32: {perplexity:.2f} per token ({bits:.3f} bits per character). The text
  comes from the running Python, so another version gives a slightly different figure.
- Licence: the weights and the tokenizer are derived from CPython's documentation text, which is
  under the Python Software Foundation License Version 2.
"""


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with `<s>` and `</s>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model; residual outputs start smaller, as in GPT-2."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=480,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.04,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            for out in (layer.self_attn.o_proj, layer.mlp.down_proj):
                out.weight.mul_(1 / math.sqrt(2 * config.num_hidden_layers))
    return model


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, ids: torch.Tensor, window: int = WINDOW) -> float:
    """Mean cross entropy in nats per predicted token over windows that do not overlap."""
    model.eval()
    rows = ids[: len(ids) // window * window].view(-1, window)
    total = 0.0
    for batch in rows.split(32):
        total += model(input_ids=batch, labels=batch).loss.item() * len(batch)
    model.train()
    return total / len(rows)


def save(
    model: LlamaForCausalLM,
    weights: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
) -> None:
    """Write a bfloat16 copy of `weights`, with configuration and tokenizer, that names no path."""
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(weights)
    copy.tie_weights()
    copy = copy.to(torch.bfloat16)
    copy.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id
    )
    folder.mkdir(parents=True, exist_ok=True)
    copy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        content = json.loads(path.read_text(encoding="utf-8"))
        for key in ("_name_or_path", "name_or_path"):
            content.pop(key, None)
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    """Train, reporting progress, and write the model's folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2217, help="optimizer steps")
    parser.add_argument(
        "--minutes", type=float, help="finish the schedule by then, in fewer steps if need be"
    )
    parser.add_argument("--batch", type=int, default=8, help="windows of 256 tokens per step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=bundled.model_path())
    parser.add_argument("--checkpoint", type=Path, help="folder for a copy every four minutes")
    parser.add_argument("--report", type=int, default=250, help="steps between reports")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    began = time.monotonic()
    tokenizer = train_tokenizer(bundled.text("train"))
    stream: list[int] = []
    for name, document in bundled.documents().items():
        if bundled.split_of(name) == "train":
            stream += [tokenizer.bos_token_id, *tokenizer.encode(document), tokenizer.eos_token_id]
    train = torch.tensor(stream)
    held_text = bundled.text("held")
    held = torch.tensor(tokenizer.encode(held_text))
    model = build_model(tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{parameters:,} parameters; {len(train):,} training and {len(held):,} held tokens; "
        f"{len(held_text) / len(held):.2f} characters per token",
        flush=True,
    )

    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    ema = {name: value.detach().clone() for name, value in model.state_dict().items()}
    checkpoint = args.checkpoint or Path(tempfile.gettempdir()) / "secateur-demo-model"
    seen, saved, running, losses = 0, began, 0.0, 0
    model.train()
    step, progress = 0, 0.0
    limit = args.minutes * 60 if args.minutes else math.inf
    while progress < 1:
        step += 1
        rate = 0.02 + 0.49 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate * min(1, step / 200)
        # one step in four reads longer windows, so that all 512 positions are trained
        length = 2 * WINDOW if step % 4 == 0 else WINDOW
        count = args.batch * WINDOW // length
        starts = torch.randint(len(train) - length, (count, 1))
        batch = train[starts + torch.arange(length)]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        now = time.monotonic()
        progress = max(step / args.steps, (now - began) / limit)
        decay = min(0.995, step / (step + 10))
        with torch.no_grad():
            for name, value in model.state_dict().items():
                ema[name].lerp_(value, 1 - decay)
        seen += batch.numel()
        running, losses = running + loss.item(), losses + 1
        if step % args.report == 0 or step == 20 or progress >= 1:
            held_loss = mean_loss(model, held)
            print(
                f"step {step}/{args.steps}  {now - began:.0f} s  {seen / (now - began):.0f} tok/s  "
                f"train loss {running / losses:.3f}  held perplexity {math.exp(held_loss):.2f}",
                flush=True,
            )
            running, losses = 0.0, 0
        if now - saved > 240:
            save(model, ema, tokenizer, checkpoint)
            saved = now
    trained = time.monotonic() - began
    on_time = step < args.steps
    used = [
        f" --{name} {getattr(args, name)}"
        for name in ("steps", *(["minutes"] if on_time else []), "batch", "lr", "threads", "seed")
        if getattr(args, name) != parser.get_default(name)
    ]
    command = "PYTHONPATH=. python scripts/train_demo_model.py" + "".join(used)
    taken = f"{step:,} steps" + (" when the time was up" if on_time else "")

    save(model, ema, tokenizer, args.out)
    final = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    nats = mean_loss(final, held)
    config = final.config
    (args.out / "README.md").write_text(
        README.format(
            parameters=parameters,
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            vocabulary=config.vocab_size,
            python=platform.python_version(),
            tokens=len(train),
            epochs=seen / len(train),
            command=command,
            taken=taken,
            window=WINDOW,
            perplexity=math.exp(nats),
            bits=nats / math.log(2) * len(held) / len(held_text),
        ),
        encoding="utf-8",
    )
    print(
        f"trained {seen:,} tokens in {trained / 60:.1f} min; train loss of the saved model "
        f"{mean_loss(final, train[: len(held)]):.3f}; held perplexity {math.exp(nats):.3f}"
    )


if __name__ == "__main__":
    main()
