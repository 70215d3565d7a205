"""A checkpoint in memory, seen as blocks whose weights mean the same in every family."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from secateur.data.tasks import PREFIX, Use, use_of
from secateur.families import FAMILIES, Anatomy, find
from secateur.models.block import Block
from secateur.models.offload import Offload
from secateur.models.parts import View
from secateur.models.residual import ResidualView
from secateur.structure.units import WIDTHS, Unit
from secateur.utils.errors import InputError, first_line, nearest, words
from secateur.utils.precision import exact_device

#: what a config raises that asks for what can't be
FAULTS_OF_CONFIG = (
    *(ValueError, RuntimeError, LookupError, TypeError, AttributeError),
    *(ArithmeticError, AssertionError),
)
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Settings:
    """How a checkpoint is opened.

    Attributes:
        device: "auto", which is a CUDA GPU or the CPU, or a torch device.
        dtype: number format to compute in; "auto" is float32 on a CPU, the stored one elsewhere.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: run the code that a checkpoint brings along.
        stream: "on" reads the model block by block and "off" whole; "auto" goes by free memory.
    """

    device: str = "auto"
    dtype: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    stream: str = "auto"

    def torch_device(self) -> torch.device:
        """The device meant.

        Raises:
            InputError: no such device.
        """
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.zeros(1, device=self.device).device
        except (RuntimeError, AssertionError) as error:
            reason = first_line(error).partition(". ")[0].removesuffix(".")
            raise InputError(f"--device {self.device}: {reason}. Try cpu.") from error
        if device.type == "meta":
            raise InputError(f"--device {self.device} holds no numbers. Try cpu.")
        return device

    def torch_dtype(self, stored: torch.dtype) -> torch.dtype:
        """The compute dtype for weights stored as ``stored``.

        Raises:
            InputError: no such format, or it or ``stored`` is one that the device has not.
        """
        device = self.torch_device()
        if self.dtype not in ("auto", *DTYPES):
            raise InputError(f"unknown --dtype {self.dtype!r}. {nearest(self.dtype, DTYPES)}")
        auto = torch.float32 if device.type == "cpu" else stored
        dtype = DTYPES.get(self.dtype, auto)
        if torch.float64 in (stored, dtype) and exact_device(device) != device:
            raise InputError(
                f"--device {self.device} has no float64, in which the model is stored or --dtype "
                f"computes. Try --device cpu."
            )
        return dtype


@dataclass
class Model:
    """A checkpoint in memory.

    Attributes:
        source: folder or hub id it came from.
        module: the transformers model, in the compute dtype, in evaluation mode.
        tokenizer: its tokenizer; of a model that reads images, its image processor.
        stored: dtype of the weights on disk, and of what will be written.
        anatomy: its family, or None where the family is unknown.
        left_out: tensors of the weight files that are no part of it: of another head, say.
        offload: what brings its blocks from disk one at a time; None where all is in memory.
    """

    source: str
    module: PreTrainedModel
    tokenizer: Any
    stored: torch.dtype
    anatomy: Anatomy | None
    left_out: tuple[str, ...] = ()
    offload: Offload | None = None

    @property
    def config(self) -> Any:
        """The transformers config."""
        return self.module.config

    @cached_property
    def use(self) -> Use:
        """What it is for."""
        return use_of(self.config)

    @property
    def narrowed(self) -> bool:
        """Whether it is a compressed checkpoint in which layers have shapes of their own."""
        return str(self.config.model_type).startswith(PREFIX)

    @property
    def positions(self) -> int | None:
        """Most tokens it can read, or None where nothing says."""
        return positions(self.config)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.module.device

    @property
    def exact_device(self) -> torch.device:
        """Where float64 numbers about it are, and what is worked out in them."""
        return exact_device(self.device)

    @cached_property
    def blocks(self) -> list[Block]:
        """The blocks, in order; those of a decoder behind those of the encoder.

        Raises:
            InputError: the family is unknown, so nothing says what is coupled to what, or a config
                speaks of blocks that there can't be.
        """
        anatomy = self.anatomy
        if anatomy is None:
            raise InputError(not_served(self.config))
        blocks: list[Block] = []
        try:
            for stack in anatomy.stacks:
                modules: Any = self.module.base_model.get_submodule(stack.blocks)
                for i, module in enumerate(modules):
                    blocks.append(Block(len(blocks), module, stack, stack.heads(self.config, i)))
        except FAULTS_OF_CONFIG as error:
            raise InputError(
                f"model {self.source!r}: its config.json describes no blocks as the family "
                f"{anatomy.family} has them ({words(first_line(error))})."
            ) from error
        if not blocks:
            raise InputError(f"model {self.source!r}: its config.json says that it has no blocks.")
        return blocks

    def resident(self, block: Block) -> AbstractContextManager[None]:
        """While this lasts, the block's weights are in memory."""
        return nullcontext() if self.offload is None else self.offload.resident(block)

    def headed(self) -> AbstractContextManager[None]:
        """While this lasts, all that is outside the blocks is in memory."""
        return nullcontext() if self.offload is None else self.offload.headed()

    def in_turn(self, blocks: Sequence[Block] | None = None) -> Iterator[Block]:
        """These blocks, or all, one after the other; the weights of each are there in its turn."""
        for block in self.blocks if blocks is None else blocks:
            with self.resident(block):
                yield block

    def prefix_of(self, block: Block) -> str:
        """What the names of a block's tensors in the model begin with, without a dot behind."""
        number = sum(b.anatomy is block.anatomy for b in self.blocks[: block.index])
        return f"{self.prefix}{block.anatomy.blocks}.{number}"

    @property
    def prefix(self) -> str:
        """What stands before the names of the base model's tensors in the whole model."""
        name: str = self.module.base_model_prefix
        return "" if self.module.base_model is self.module else f"{name}."

    def units(
        self, multiple_of: int, kinds: Sequence[str] = WIDTHS, biased: bool = False
    ) -> list[Unit]:
        """All units of some kinds: block by block, then those that run through all blocks."""
        units = [unit for b in self.blocks for unit in b.units(multiple_of, kinds, biased)]
        through = [v.unit(multiple_of, biased) for v in self.views if v.kind in kinds]
        return [*units, *(unit for unit in through if unit is not None)]

    @property
    def views(self) -> list[View]:
        """What the units are that run through all blocks."""
        return [ResidualView(self.module, self.blocks, self.anatomy)]

    def obstacles_of(self, kinds: Sequence[str]) -> list[str]:
        """Why units of some kinds must stay, each reason once."""
        views = [*(view for block in self.blocks for view in block.views), *self.views]
        found = {view.obstacle for view in views if view.kind in kinds}
        notes = {n for block in self.blocks for part in block.parts for n in part.notes(kinds)}
        return sorted({reason for reason in found if reason} | notes)


def fingerprint(model: Model) -> str:
    """Hash of the config and the weights: each tensor's name, shape and up to 4096 numbers."""
    assert model.blocks  # seen as blocks, fused weights have one set of names
    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "dtype"):  # no part of what it computes
        config.pop(name, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    picked: dict[str, bytes] = {}
    if model.offload is not None:
        for block in model.in_turn():
            own = block.module.named_parameters(model.prefix_of(block))
            picked |= {name: _some_numbers(parameter, model.stored) for name, parameter in own}
    with model.headed():
        for name, parameter in model.module.named_parameters():
            digest.update(f"{name} {tuple(parameter.shape)}".encode())
            known = picked.get(name)
            digest.update(_some_numbers(parameter, model.stored) if known is None else known)
    return digest.hexdigest()[:16]


def _some_numbers(parameter: torch.Tensor, dtype: torch.dtype) -> bytes:
    flat = parameter.detach().flatten()
    picked = flat[:: max(1, len(flat) // 4096)].to("cpu", dtype)
    return picked.contiguous().view(torch.uint8).numpy().tobytes()


def positions(config: Any) -> int | None:
    """Most tokens that a model of this config can read, or None where nothing says."""
    found: int | None = getattr(config, "max_position_embeddings", None)
    return found


def anatomy_of(config: Any) -> Anatomy | None:
    """What is coupled in a model of this config, or None where it is not served.

    A compressed checkpoint has the anatomy of what it was made from.
    """
    model_type: str = config.model_type.removeprefix(PREFIX)
    families = (f for f in FAMILIES if model_type in f.model_types)
    return next((f for f in families if f.refusal(config) is None), None)


def has_forms(config: Any) -> bool:
    """Whether some layers of a checkpoint are said to have a weight of another form."""
    shapes = getattr(config, "secateur", None)
    return isinstance(shapes, dict) and '"forms"' in json.dumps(shapes, default=str)


def not_served(config: Any) -> str:
    """Why no anatomy describes a model, and what can be done with it."""
    model_type: str = config.model_type
    family = find(model_type.removeprefix(PREFIX))
    if family is not None:
        return (
            f"{family.refusal(config)}. Models of family {family.family} without that can be "
            f"narrowed; `secateur inspect` and `secateur eval` take this one too."
        )
    served = ", ".join(sorted({t for family in FAMILIES for t in family.model_types}))
    return (
        f"model_type {model_type!r} is a family that no anatomy describes, so nothing says which "
        f"of its weights belong together and no method can narrow it. If it is a causal "
        f"language model, `secateur inspect` still lists its linear layers and `secateur eval` "
        f"measures it. Families served: {served}. "
        f"docs/extending.md shows how to add one."
    )
