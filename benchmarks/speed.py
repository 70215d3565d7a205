"""Speed of narrowed models in transformers against what their operations allow.

    python benchmarks/speed.py [--threads 2] [--dtype float32] [--clock wall]

Prints a Markdown section. Models of random weights are laid out by hand and run by the classes
that load every checkpoint. Dense and narrowed take turns in one run; a figure is the median of
the turns' ratios. "Allowed" is the dense model's operations over the narrowed one's; what is
reached of it is the measured speed-up over that. On a busy machine take one thread and --clock cpu.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import secateur
from secateur.layers import modeling_secateur

TARGET = 0.9
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Layer:
    """Sizes of one layer as shares of the dense ones."""

    mlp: float = 1.0
    query_key: float = 1.0
    value: float = 1.0


def each(**sizes: float) -> Callable[[int, int], Layer]:
    return lambda layer, layers: Layer(**sizes)


def mixed(keep: float) -> Callable[[int, int], Layer]:
    """As an allocator mixes them: later layers, and queries and keys, give more."""

    def sizes(layer: int, layers: int) -> Layer:
        tilt = 0.3 * (0.5 - layer / max(1, layers - 1)) * (1 - keep) * 2
        wave = 0.1 * (-1) ** layer
        return Layer(keep + tilt, keep + wave - 0.125, min(1.0, keep - wave + 0.125))

    return sizes


PLANS: tuple[tuple[str, Callable[[int, int], Layer]], ...] = (
    ("nothing, own attention", each()),
    ("MLP .75", each(mlp=0.75)),
    ("MLP .5", each(mlp=0.5)),
    ("query/key .625, value .875", each(query_key=0.625, value=0.875)),
    ("query/key .375, value .625", each(query_key=0.375, value=0.625)),
    ("all .75, by layer", mixed(0.75)),
    ("all .5, by layer", mixed(0.5)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--mlp", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--clock", default="wall", choices=CLOCKS)
    parser.add_argument("--plans", default="", help="only those whose name has one of these words")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    dtype, clock = getattr(torch, arguments.dtype), CLOCKS[arguments.clock]
    config = LlamaConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.mlp,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        max_position_embeddings=2048,
        dtype=dtype,
    )
    dense = made(LlamaForCausalLM, config, dtype)
    print(
        f"A Llama of {arguments.layers} layers, hidden {arguments.hidden}, MLP {arguments.mlp}, "
        f"{arguments.heads} heads for {arguments.kv_heads} KV heads,\n{arguments.vocabulary} "
        f"tokens of vocabulary; {arguments.dtype}, threads: {arguments.threads}, "
        f"{arguments.clock} clock. Prefill of\n{arguments.prompt} tokens, then {arguments.new} "
        f"tokens one by one; batch 1. "
        f"Speed-up over dense, what operations allow,\nand the share of it that is reached "
        f"(at least {TARGET:g} wanted).\n"
    )
    print("| narrowed | prefill | allowed | reached | decode | allowed | reached |")
    print("|---|---|---|---|---|---|---|")
    wanted = arguments.plans.split()
    for name, plan in PLANS:
        if wanted and not any(word in name for word in wanted):
            continue
        narrow = made(narrow_class(), laid_out(config, plan), dtype)
        reading, writing = turns(dense, narrow, arguments, clock)
        cells = []
        for phase, speed_up in (("prefill", reading), ("decode", writing)):
            given = (arguments.prompt, arguments.new, phase == "decode")
            allowed = operations(dense, *given) / operations(narrow, *given)
            cells += [f"{speed_up:.2f}", f"{allowed:.2f}", f"{speed_up / allowed:.2f}"]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
        del narrow


def narrow_class() -> Any:
    return modeling_secateur.SecateurLlamaForCausalLM


def laid_out(config: LlamaConfig, plan: Callable[[int, int], Layer]) -> Any:
    """The config of a narrowed model, as a checkpoint has it."""
    hidden, layers = config.hidden_size, []
    for i in range(config.num_hidden_layers):
        layer = plan(i, config.num_hidden_layers)
        width = rounded(layer.mlp * config.intermediate_size, 8)
        query_key = rounded(layer.query_key * config.head_dim, 2)
        linears = {
            f"mlp.{name}_proj": {"in": hidden, "out": width, "bias": False}
            for name in ("gate", "up")
        }
        linears["mlp.down_proj"] = {"in": width, "out": hidden, "bias": False}
        attention = {
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "query_key": query_key,
            "value": rounded(layer.value * config.head_dim, 1),
            "bias": "",
            "rotary": "all" if query_key == config.head_dim else "chosen",
        }
        touched = layer.query_key < 1 or layer.value < 1 or layer == Layer()
        layers.append({"linears": linears} | ({"attention": attention} if touched else {}))
    fields = config.to_dict()
    fields.pop("model_type")
    shapes = {"version": 1, "blocks": "layers", "attention": "self_attn", "layers": layers}
    return modeling_secateur.SecateurLlamaConfig(**fields, secateur=shapes)


def rounded(size: float, step: int) -> int:
    return max(step, step * round(size / step))


def made(kind: Any, config: Any, dtype: torch.dtype) -> Any:
    """A model of random weights and, where pairs are chosen, of random pairs."""
    with torch.device("meta"):
        model = kind(config)
    model = model.to_empty(device="cpu").to(dtype).eval().requires_grad_(False)
    table = model.model.rotary_emb
    table.inv_freq, table.attention_scaling = table.compute_default_rope_parameters(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1)
        for module in model.modules():
            if hasattr(module, "rope_pairs"):
                own = module.rope_pairs
                pairs = [torch.randperm(config.head_dim // 2)[: own.shape[1]] for _ in own]
                own.copy_(torch.stack([p.sort().values for p in pairs]))
    return model


def operations(model: Any, prompt: int, new: int, decoding: bool) -> float:
    """Multiplications for a token: those of all matrices, and of attention at its mean reach."""
    linears = (m for m in model.modules() if isinstance(m, nn.Linear))
    count = float(sum(m.in_features * m.out_features for m in linears))
    reach = prompt + new / 2 if decoding else prompt / 2
    for layer in model.model.layers:
        attention: Any = layer.self_attn
        heads = model.config.num_attention_heads
        widths = (attention.q_proj.out_features + attention.o_proj.in_features) // heads
        count += heads * widths * reach
    return count


def turns(dense: Any, narrow: Any, arguments: Any, clock: Callable[[], float]) -> tuple[float, ...]:
    """Median speed-up at prefill and at decode."""
    ids = torch.arange(arguments.prompt).unsqueeze(0) % arguments.vocabulary
    found: list[tuple[float, float]] = []
    for turn in range(arguments.turns + 1):
        order = (dense, narrow) if turn % 2 else (narrow, dense)
        seconds = {id(model): timed(model, ids, arguments.new, clock) for model in order}
        if turn:  # the first warms up
            pairs = zip(seconds[id(dense)], seconds[id(narrow)], strict=True)
            reading, writing = (before / after for before, after in pairs)
            found.append((reading, writing))
    return tuple(statistics.median(phase) for phase in zip(*found, strict=True))


def timed(
    model: Any, ids: torch.Tensor, new: int, clock: Callable[[], float]
) -> tuple[float, float]:
    """Seconds of reading a prompt, and of writing behind it."""
    with torch.inference_mode():
        start = clock()
        state = model(input_ids=ids, use_cache=True)
        read = clock()
        for _ in range(new):
            last = state.logits[:, -1:].argmax(-1)
            state = model(input_ids=last, past_key_values=state.past_key_values, use_cache=True)
        return read - start, clock() - read


if __name__ == "__main__":
    assert secateur.__version__
    main()
