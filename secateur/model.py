"""Open a checkpoint and see it as blocks whose weights mean the same in every family."""

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from secateur import bundled
from secateur.anatomy import FAMILIES, Anatomy, Heads, Projection, find
from secateur.errors import InputError
from secateur.layers.modeling_secateur import NarrowAttention, narrow_attention
from secateur.units import MLP, QueryKey, Unit, ValueOutput

DEMO = "demo"


@dataclass(frozen=True)
class Settings:
    """How a checkpoint is opened.

    Attributes:
        device: "auto", or a torch device.
        dtype: number format to compute in; "auto" is float32 on a CPU, the stored one elsewhere.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: run the code that a checkpoint brings along.
    """

    device: str = "auto"
    dtype: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False

    def torch_device(self) -> torch.device:
        """The device meant.

        Raises:
            InputError: no such device.
        """
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            return torch.zeros(1, device=self.device).device
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"--device {self.device}: {_first_line(error)}. Try cpu.") from error

    def torch_dtype(self, stored: torch.dtype) -> torch.dtype:
        """The compute dtype for weights stored as ``stored``."""
        if self.dtype == "auto":
            return torch.float32 if self.torch_device().type == "cpu" else stored
        found = getattr(torch, self.dtype, None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise InputError(f"--dtype {self.dtype}: choose float32, bfloat16 or float16.")
        return found


@dataclass
class Block:
    """One transformer block: its module and the weights that its units couple.

    Creating it replaces the block's attention by a :class:`NarrowAttention` of full width with
    the same weights, so that statistics and narrowing meet one kind of attention everywhere.
    ``stock_attention`` keeps the replaced module, which shares its weights where it can.
    """

    index: int
    module: nn.Module
    anatomy: Anatomy
    heads: Heads
    attention: NarrowAttention = field(init=False)
    stock_attention: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.stock_attention = self.module.get_submodule(self.anatomy.attention)
        self.replace_attention(uniform_attention(self.stock_attention, self.anatomy, self.heads))

    def replace_attention(self, attention: NarrowAttention) -> None:
        """Put another attention in the block."""
        self.attention = attention
        self.module.set_submodule(self.anatomy.attention, attention)

    @property
    def producers(self) -> list[tuple[nn.Module, int]]:
        """The linears that make the MLP's hidden channels, with their number of equal parts."""
        return [(self.module.get_submodule(path), n) for path, n in self.anatomy.producers]

    @property
    def consumer(self) -> nn.Module:
        """The linear that reads the MLP's hidden channels."""
        return self.module.get_submodule(self.anatomy.consumer)

    @property
    def consumer_weight(self) -> Tensor:
        """The consumer's weight as (hidden channels, outputs), float64."""
        return inputs_by_outputs(self.consumer).double()

    @property
    def output_weight(self) -> Tensor:
        """The output projection as (kv heads, value width, group × hidden), float64."""
        attention = self.attention
        weight = attention.o_proj.weight.double()  # hidden, heads * value
        parts = weight.view(-1, attention.kv_heads, attention.num_key_value_groups, attention.value)
        return parts.permute(1, 3, 2, 0).flatten(2)

    def units(self, multiple_of: int) -> list[Unit]:
        """The axes that can shrink; MLP widths go in multiples of ``multiple_of``."""
        attention, name = self.attention, f"layers.{self.index}"
        hidden = attention.o_proj.out_features
        producers = self.producers
        mlp = MLP(
            name=f"{name}.mlp",
            block=self.index,
            size=inputs_by_outputs(self.consumer).shape[0],
            step=multiple_of,
            hidden=hidden,
            producers=sum(parts for _, parts in producers),
            biased_producers=sum(parts for m, parts in producers if m.bias is not None),
        )
        units: list[Unit] = [mlp]
        if self.query_key_obstacle is None:
            query_key = QueryKey(
                name=f"{name}.query_key",
                block=self.index,
                size=attention.query_key,
                step=2,
                hidden=hidden,
                heads=attention.heads,
                kv_heads=attention.kv_heads,
                query_bias=attention.q_proj.bias is not None,
                key_bias=attention.k_proj.bias is not None,
                rotary=self.heads.rotary > 0,
            )
            units.append(query_key)
        value_output = ValueOutput(
            name=f"{name}.value_output",
            block=self.index,
            size=attention.value,
            step=1,
            hidden=hidden,
            heads=attention.heads,
            kv_heads=attention.kv_heads,
            value_bias=attention.v_proj.bias is not None,
            output_bias=attention.o_proj.bias is not None,
        )
        return [*units, value_output]

    @property
    def query_key_obstacle(self) -> str | None:
        """Why the query/key width of this block must stay, or None."""
        if self.attention.q_norm is None:
            return None
        return (
            "queries and keys stay at full width: this family normalises inside its heads, and a "
            "norm over fewer dims is another norm"
        )


def uniform_attention(stock: nn.Module, anatomy: Anatomy, heads: Heads) -> NarrowAttention:
    """A full-width NarrowAttention with the weights of ``stock``, in its own layout of pairs."""
    maps = anatomy.project(stock, heads)
    shape = {
        "heads": heads.heads,
        "kv_heads": heads.kv_heads,
        "query_key": heads.width,
        "value": heads.width,
        "bias": "".join(n for n, p in zip("qkvo", maps, strict=True) if p.bias is not None),
        "rotary": "all" if heads.rotary else "none",
    }
    with torch.device("meta"):
        attention = narrow_attention(stock, shape).train(stock.training)
    q, k, v, o = maps
    if 0 < heads.rotary < heads.width:
        q, k = (_pairs_first(p, heads) for p in (q, k))
    for module, part in zip(
        (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
        (q, k, v, o),
        strict=True,
    ):
        set_linear(module, part.weight, part.bias)
    return attention


def _pairs_first(part: Projection, heads: Heads) -> Projection:
    """Reorder each head from (rotating halves, still rest) to (all first halves, all second)."""
    half, rest = heads.rotary // 2, (heads.width - heads.rotary) // 2
    firsts = [*range(half), *range(heads.rotary, heads.rotary + rest)]
    seconds = [*range(half, heads.rotary), *range(heads.rotary + rest, heads.width)]
    order = torch.tensor(firsts + seconds, device=part.weight.device)
    weight = part.weight.view(-1, heads.width, part.weight.shape[1])[:, order].flatten(0, 1)
    if part.bias is None:
        return Projection(weight, None)
    return Projection(weight, part.bias.view(-1, heads.width)[:, order].flatten())


def inputs_by_outputs(module: nn.Module) -> Tensor:
    """A view of a linear's or Conv1D's weight as (inputs, outputs)."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.t() if isinstance(module, nn.Linear) else weight


def set_linear(module: Any, weight: Tensor, bias: Tensor | None) -> None:
    """Give a linear or Conv1D other weights (outputs, inputs); its sizes follow."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    else:
        module.nx, module.nf = weight.shape[1], weight.shape[0]
        weight = weight.t()
    module.weight = nn.Parameter(weight.detach(), requires_grad=False)
    module.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)


@dataclass
class Model:
    """A checkpoint in memory.

    Attributes:
        source: folder or hub id it came from.
        module: the transformers model, in the compute dtype, in evaluation mode.
        tokenizer: its tokenizer.
        stored: dtype of the weights on disk, and of what will be written.
        anatomy: its family, or None where the family is unknown.
    """

    source: str
    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stored: torch.dtype
    anatomy: Anatomy | None

    @property
    def config(self) -> Any:
        """The transformers config."""
        return self.module.config

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.module.device

    @cached_property
    def blocks(self) -> list[Block]:
        """The blocks, in order.

        Raises:
            InputError: the family is unknown, so nothing says what is coupled to what.
        """
        anatomy = self.anatomy
        if anatomy is None:
            raise InputError(unknown_family(self.config.model_type))
        heads = Heads.of(self.config, anatomy.rotary)
        modules: Any = self.module.base_model.get_submodule(anatomy.blocks)
        return [Block(i, module, anatomy, heads) for i, module in enumerate(modules)]

    def units(self, multiple_of: int) -> list[Unit]:
        """All axes that can shrink, block by block."""
        return [unit for block in self.blocks for unit in block.units(multiple_of)]


def unknown_family(model_type: str) -> str:
    """What can be done with a model of a family that no anatomy describes."""
    if model_type.startswith("secateur_"):
        return "this checkpoint is already compressed; start from the original model instead."
    served = ", ".join(sorted(t for family in FAMILIES for t in family.model_types))
    return (
        f"model_type {model_type!r} is a family that no anatomy describes, so nothing says which "
        f"of its weights belong together and no method can narrow it. `secateur inspect` still "
        f"lists its linear layers and `secateur eval` measures it. Families served: {served}. "
        f"docs/extending.md shows how to add one."
    )


def locate(source: str | Path) -> str:
    """A folder's path, a hub id, or for "demo" the model inside this package."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return str(folder)
    return str(bundled.model_path()) if str(source) == DEMO else str(source)


def read_config(source: str, settings: Settings) -> Any:
    """The transformers config of a folder or hub id.

    Raises:
        InputError: there is no such folder, hub id or readable config.
    """
    found = locate(source)
    folder = Path(found)
    if folder.exists() or found.startswith((".", "/", "~")) or found.count("/") > 1:
        if not folder.is_dir():
            raise InputError(f"model {source!r}: no such folder.")
        if not (folder / "config.json").is_file():
            raise InputError(f"model {source!r}: the folder holds no config.json.")
    try:
        return AutoConfig.from_pretrained(
            found,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
        )
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise InputError(f"model {source!r}: {_first_line(error)}") from error


def open_model(source: str | Path, settings: Settings | None = None) -> Model:
    """Load a checkpoint with its tokenizer and check that it is whole.

    Use it for any folder or hub id that transformers opens. The whole model is held in memory.

    Raises:
        InputError: missing or corrupt files, weights that are missing, NaN or infinite, or a
            tokenizer with more tokens than the model has embeddings.
    """
    settings, source = settings or Settings(), locate(source)
    config = read_config(source, settings)
    common = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    try:
        opened: Any = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype="auto", output_loading_info=True, **common
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise InputError(f"model {source!r}: {_reason(error)}") from error
    module, loaded = opened
    if loaded["missing_keys"]:
        missing = sorted(loaded["missing_keys"])
        raise InputError(
            f"model {source!r}: {len(missing)} weights are missing from the checkpoint, "
            f"{missing[0]} first. Fetch the model again."
        )
    stored = module.dtype
    module = module.to(settings.torch_device()).eval()
    cast(module, settings.torch_dtype(stored))
    module.requires_grad_(False)
    for name, parameter in module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise InputError(
                f"model {source!r}: {name} holds NaN or infinite numbers; the file is damaged, or "
                f"the training that wrote it had diverged."
            )
    tokenizer = open_tokenizer(source, module, settings)
    return Model(source, module, tokenizer, stored, find(config.model_type))


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Convert the parameters in place; buffers such as rotary frequencies keep their precision."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


def open_tokenizer(
    source: str, module: PreTrainedModel, settings: Settings
) -> PreTrainedTokenizerBase:
    """Load the tokenizer and hold it against the model's embeddings."""
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            source, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"model {source!r}: no usable tokenizer: {_first_line(error)}") from error
    embeddings: Any = module.get_input_embeddings()
    rows, highest = embeddings.weight.shape[0], max(tokenizer.get_vocab().values(), default=-1)
    if highest < 0:
        raise InputError(f"model {source!r}: its tokenizer is empty or missing.")
    if highest >= rows:
        raise InputError(
            f"model {source!r}: the tokenizer has ids up to {highest} but the model embeds only "
            f"{rows} tokens; they are not from the same model."
        )
    return tokenizer  # type: ignore[no-any-return]


def _reason(error: Exception) -> str:
    if isinstance(error, SafetensorError):
        return f"a weight file is corrupt or cut short ({_first_line(error)}). Fetch it again."
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
