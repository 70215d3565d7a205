"""Models that are never whole in memory: a block's weights are there while they are needed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from secateur.io.safetensors_reader import TensorReader
from secateur.layers.factored_secateur import Factored
from secateur.models.block import Block
from secateur.utils.errors import InputError

CHECKED = 2**22  # numbers at once


class Offload:
    """Where the weights of a model are: in its files, and a few blocks of them in memory.

    Outside the blocks all is in memory from the start, but for a head of its own, which is there
    while it is called or inside :meth:`headed`. A block that is called is fetched for that call;
    inside :meth:`resident` it stays. Whatever was changed in a block is lost when it leaves.

    Attributes:
        folder: where hidden states go that are too many for memory; None is the system's own.
    """

    def __init__(
        self,
        source: str,
        module: PreTrainedModel,
        shelf: TensorReader,
        inside: tuple[str, ...],
        device: torch.device,
        dtype: torch.dtype,
        folder: Path | None,
    ) -> None:
        self.source = source
        self.device = device
        self.dtype = dtype
        self.folder = folder
        self._reader = shelf
        self._names = found_names(source, module, shelf)
        self._staying: set[int] = set()
        self._left: set[int] = set()
        self._ahead: dict[int, list[str]] = {}
        self._head: nn.Module | None = own_head(module)
        self._heads = 0  # how many want it to stay
        with torch.no_grad():
            fill_buffers(module, device)
            head = {id(p) for p in self._head.parameters()} if self._head is not None else set()
            own = {name for name, tensor in entries(module) if id(tensor) in head}
            self._head_names = sorted(own)
            for tensor in module.parameters():  # in place, so that what is shared stays so
                if tensor.is_floating_point():
                    tensor.data = tensor.data.to(dtype)
            outside = [n for n, _ in entries(module) if not n.startswith(inside)]
            for name in outside:
                if name not in own:
                    path, _, last = name.rpartition(".")
                    owner = module.get_submodule(path)
                    set_entry(owner, last, self._one(name, last in owner._parameters))
            module.tie_weights()
        if self._head is not None:
            self._head.register_forward_pre_hook(lambda *_: self._take_head())
            self._head.register_forward_hook(lambda *_: self._drop_head(), always_call=True)

    @property
    def left_out(self) -> tuple[str, ...]:
        """Tensors of the files that are no part of the model."""
        return tuple(sorted(self._reader.names() - {*self._names.values()}))

    @contextmanager
    def headed(self) -> Iterator[None]:
        """Have the head in memory for a while."""
        self._take_head()
        try:
            yield
        finally:
            self._drop_head()

    def _take_head(self) -> None:
        if self._head is not None and not self._heads:
            for name in self._head_names:
                set_entry(self._head, name.rpartition(".")[2], self._one(name))
        self._heads += 1

    def _drop_head(self) -> None:
        if not self._heads:  # it could not be read
            return
        self._heads -= 1
        if self._head is not None and not self._heads:
            for name, tensor in list(entries(self._head)):
                set_entry(self._head, name, torch.empty_like(tensor, device="meta"))

    def house(self, blocks: list[Block], prefixes: list[str]) -> None:
        """Take in the blocks of the model, whose names in it begin so."""
        self._prefixes = prefixes
        for before, block in zip([None, *blocks], blocks, strict=False):
            own = [prefixes[block.index] + name for name, _ in self._parts(block)]
            if before is not None:
                self._ahead[before.index] = [self._names[name] for name in own]
            self._hook(block)

    def _hook(self, block: Block) -> None:
        """Fetch the block for every call of its own forward."""

        def own(module: nn.Module) -> bool:  # and not one that was put in its place
            return "forward" not in module.__dict__ and block.index not in self._staying

        def before(module: nn.Module, _: Any) -> None:
            if own(module):
                self._fetch(block)

        def behind(module: nn.Module, *_: Any) -> None:
            if own(module):
                self._release(block)

        block.module.register_forward_pre_hook(before)
        block.module.register_forward_hook(behind, always_call=True)

    @contextmanager
    def resident(self, block: Block) -> Iterator[None]:
        """Have a block in memory for a while; a block that is there already stays as it is."""
        if block.index in self._staying:
            yield
            return
        self._fetch(block)
        self._staying.add(block.index)
        try:
            yield
        finally:
            self._staying.discard(block.index)
            self._release(block)

    def leave(self, block: Block) -> None:
        """A block was written in another shape; it does not come back."""
        self._left.add(block.index)

    def _fetch(self, block: Block) -> None:
        assert block.index not in self._left
        prefix = self._prefixes[block.index]
        with torch.no_grad():
            for name, owner in self._parts(block):
                own = name.rpartition(".")[2]
                set_entry(owner, own, self._one(prefix + name, own in owner._parameters))
            for mixer in block.mixers:
                if mixer.module is not mixer.stock:
                    mixer.restore()
        self._reader.expect(self._ahead.get(block.index, []))

    def _release(self, block: Block) -> None:
        for module in (block.module, *(mixer.stock for mixer in block.mixers)):
            for _, owner in _owners(module):
                if isinstance(owner, Factored):
                    owner.forget()
            for name, tensor in list(entries(module)):
                path, _, own = name.rpartition(".")
                set_entry(module.get_submodule(path), own, torch.empty_like(tensor, device="meta"))

    def _parts(self, block: Block) -> list[tuple[str, nn.Module]]:
        """Names of a block's tensors as they are stored, and the modules that own them."""
        replaced = [mixer for mixer in block.mixers if mixer.module is not mixer.stock]
        inside = tuple(f"{mixer.path}." for mixer in replaced)
        found = [
            (_join(path, name), owner)
            for path, owner in _owners(block.module)
            if not f"{path}.".startswith(inside)
            for name in _own(owner)
        ]
        for mixer in replaced:
            for path, owner in _owners(mixer.stock):
                found += [(_join(_join(mixer.path, path), name), owner) for name in _own(owner)]
        return found

    def _one(self, name: str, computes: bool = True) -> Tensor:
        """A tensor in memory, in the format that is computed in or, if it is not, as stored."""
        kept = self._reader.read(self._names[name], self.dtype if computes else None)
        tensor = kept.to(self.device)
        if not tensor.is_floating_point():
            return tensor
        if not all(bool(torch.isfinite(part).all()) for part in tensor.flatten().split(CHECKED)):
            raise InputError(
                f"model {self.source!r}: {name} holds NaN or infinite numbers; the file is "
                f"damaged, or the training that wrote it had diverged."
            )
        return tensor


def published_name(module: PreTrainedModel) -> Callable[[str, Tensor], str]:
    """A tensor's name in published checkpoints, where transformers renames it on loading."""

    def rename(name: str, tensor: Tensor) -> str:
        (published,) = revert_weight_conversion(module, {name: tensor})
        return str(published)

    return rename


def found_names(source: str, module: PreTrainedModel, shelf: TensorReader) -> dict[str, str]:
    """Under which name the files hold each tensor of a model without storage.

    Raises:
        InputError: one is missing, has another shape, or is put together from several on loading.
    """
    rename, prefix = published_name(module), f"{module.base_model_prefix}."
    found: dict[str, str] = {}
    for name, tensor in entries(module):
        try:
            published = rename(name, tensor)
        except (ValueError, RuntimeError, NotImplementedError):
            published = name
        options = [published, name, *(n.removeprefix(prefix) for n in (published, name))]
        options += [prefix + n for n in (published, name)]
        there = next((option for option in options if option in shelf), None)
        if there is None:
            raise InputError(
                f"model {source!r}: {name} is missing from the weight files, or is put together "
                f"from several when they are loaded; a model like this can't be read block by "
                f"block. Fetch it again, or give the whole model memory (--stream off)."
            )
        if shelf.shape(there) != tuple(tensor.shape):
            raise InputError(
                f"model {source!r}: {there} has shape {shelf.shape(there)}, but config.json asks "
                f"for {tuple(tensor.shape)}; they are not from the same model."
            )
        found[name] = there
    return found


def own_head(module: PreTrainedModel) -> nn.Module | None:
    """The linear layer that makes the logits, where it shares its weight with nothing."""
    head = module.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.weight is module.get_input_embeddings().weight:
        return None
    return head


def fill_buffers(module: PreTrainedModel, device: torch.device) -> None:
    """Make what no file holds: rotary tables and the like, which transformers computes."""
    for owner in module.modules():
        own = [n for n in owner._non_persistent_buffers_set if getattr(owner, n, None) is not None]
        if own:
            for name in own:
                owner._buffers[name] = torch.empty_like(getattr(owner, name), device=device)
            module._init_weights(owner)


def entries(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a module's files hold, by name; a tied tensor once."""
    seen: set[int] = set()
    for path, owner in _owners(module):
        for name in _own(owner):
            tensor = getattr(owner, name)
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield _join(path, name), tensor


def set_entry(owner: nn.Module, name: str, tensor: Tensor) -> None:
    """Give a module another parameter or buffer of its own."""
    if name in owner._parameters:
        owner._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[name] = tensor


def _owners(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield from module.named_modules()


def _own(owner: nn.Module) -> list[str]:
    """Names of the parameters and of the stored buffers that are a module's own."""
    kept = (n for n, b in owner._buffers.items() if b is not None)
    stored = [name for name in kept if name not in owner._non_persistent_buffers_set]
    return [*(name for name, p in owner._parameters.items() if p is not None), *stored]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name
