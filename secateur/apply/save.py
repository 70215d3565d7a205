"""Write a compressed model as safetensors and JSON, shard by shard, in the tier its plan needs."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING

from secateur.apply.renumbering import close_ranks, place, renumber
from secateur.apply.residual_slicing import residual_layout
from secateur.data.tasks import PREFIX
from secateur.families import Anatomy
from secateur.io.safetensors_writer import Writer
from secateur.layers import modeling_secateur
from secateur.layers.factored_secateur import Factored
from secateur.layers.integers import Integers, quantization_config
from secateur.models.attention import Attention
from secateur.models.block import Block
from secateur.models.model import Model
from secateur.models.offload import published_name
from secateur.structure.budget import Written
from secateur.utils.errors import InputError

Part = TypeVar("Part")
#: imports the other files of its folder that are called so, and is written beside weights with them
CODE = Path(str(modeling_secateur.__file__))


def writer_for(model: Model, tier: Written, folder: Path) -> Writer:
    """A writer whose names any reader knows, where the checkpoint is for any reader."""
    if tier == "plain":
        return Writer(folder, rename=published_name(model.module))
    return Writer(folder)


def finish(model: Model, tier: Written, writer: Writer, settle: bool = True) -> None:
    """Write all that :func:`store_block` doesn't; what is gone leaves the model.

    Unless it may ``settle``, the writer keeps what going on from before would take.

    Raises:
        InputError: a weight is beyond the largest number of the stored format.
    """
    with model.headed():
        store_rest(model, writer)
    writer.finish()
    if settle:
        writer.settle()
    close_ranks(model)
    write_config(model, tier, writer.folder)


def block_prefix(model: Model, block: Block) -> str:
    """Name of a block in the state dict of what is written, with a dot behind."""
    return f"{model.prefix}{block.anatomy.blocks}.{place(model, block)}."


def store_block(model: Model, block: Block, writer: Writer) -> None:
    """Write a finished block, and round its weights in memory as the file has them.

    An attention that no unit changed is written in the family's own layout, fused or not. Of a
    block that is gone nothing is written.

    Raises:
        InputError: a weight is beyond the largest number of the stored format.
    """
    if block.gone:
        return
    renumber(model, block)
    prefix = block_prefix(model, block)
    same = [mixer for mixer in block.mixers if not attention_changed(mixer)]
    for mixer in same:
        for name, layer in integers_in(mixer.module):
            mixer.stock.set_submodule(name, layer)
    _round(block.module, model.stored, prefix)
    for mixer in block.mixers:
        _round(mixer.stock, model.stored, f"{prefix}{mixer.path}.")
    inside = tuple(f"{mixer.path}." for mixer in same)
    for name, tensor in block.module.state_dict().items():
        if not name.startswith(inside):
            writer.add(prefix + name, _stored(tensor, model.stored))
    for mixer in same:
        for name, tensor in mixer.stock.state_dict().items():
            writer.add(f"{prefix}{mixer.path}.{name}", _stored(tensor, model.stored))


def store_rest(model: Model, writer: Writer) -> None:
    """Write everything outside the blocks; a tied head is written once, as the embedding.

    Raises:
        InputError: a weight is beyond the largest number of the stored format.
    """
    assert model.anatomy is not None
    inside = tuple(f"{model.prefix}{stack.blocks}." for stack in model.anatomy.stacks)
    _round(model.module, model.stored, "", inside)
    seen: set[int] = set()
    for name, tensor in _state(model.module):
        if not name.startswith(inside) and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            writer.add(name, _stored(tensor, model.stored))


def _state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """State dict entries, parameters that are shared under their first name first."""
    state = module.state_dict()
    first = [name for name, _ in module.named_parameters() if name in state]  # not of packed ones
    yield from ((name, state[name]) for name in first)
    yield from ((name, tensor) for name, tensor in state.items() if name not in set(first))


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _round(module: nn.Module, dtype: torch.dtype, prefix: str, done: tuple[str, ...] = ()) -> None:
    for name, parameter in module.named_parameters():
        if name.startswith(done):
            continue
        rounded = parameter.data.to(dtype)
        if not bool(torch.isfinite(rounded).all()):
            raise InputError(
                f"{prefix}{name} has numbers up to {float(parameter.data.abs().max()):.3g} by now, "
                f"and {str(dtype).removeprefix('torch.')}, in which the model is stored, ends at "
                f"{torch.finfo(dtype).max:.3g}; store the model as bfloat16 or float32, or narrow "
                f"less."
            )
        parameter.data = rounded.to(parameter.dtype)
    for layer in module.modules():
        if isinstance(layer, Factored):
            layer.forget()


def attention_changed(mixer: Attention) -> bool:
    """Whether an attention differs in shape or form from the stock one."""
    attention, layout = mixer.module, mixer.layout
    if attention is mixer.stock:  # so it came, from a compressed checkpoint
        return True
    shape = attention.shape
    stock = {"query_key": layout.width, "value": layout.width, "kv_heads": layout.kv_heads}
    if "hidden" in shape or any(shape[name] != size for name, size in stock.items()):
        return True
    if any(not mixer.published(name) for name, _ in integers_in(attention)):
        return True
    return any(isinstance(module, Factored) for module in attention.children())


def integers_in(attention: nn.Module) -> list[tuple[str, Integers]]:
    """The layers of an attention that are stored packed, by name."""
    return [(name, m) for name, m in attention.named_children() if isinstance(m, Integers)]


def linear_layers(model: Model) -> dict[str, nn.Module]:
    """All linear layers by the names that they have in a written model.

    What is gone must have left it (:func:`~secateur.apply.renumbering.close_ranks`).
    """
    found = as_written(model, lambda module: dict(module.named_modules()))
    return {name: layer for name, layer in found.items() if isinstance(layer, nn.Linear)}


def as_written(model: Model, parts: Callable[[nn.Module], Mapping[str, Part]]) -> dict[str, Part]:
    """The named parts of a model as it is written: an attention that is as it was is the stock one.

    ``parts`` gives those of a module by their names in it.
    """
    found = dict(parts(model.module))
    for block in model.blocks:
        for mixer in block.mixers:
            if not attention_changed(mixer):
                inside = f"{block_prefix(model, block)}{mixer.path}."
                found = {name: part for name, part in found.items() if not name.startswith(inside)}
                found |= {inside + name: part for name, part in parts(mixer.stock).items()}
    return found


def layout(model: Model) -> dict[str, Any]:
    """The ``secateur`` block of config.json: the shape of everything that is not stock."""
    assert model.anatomy is not None
    shapes: dict[str, Any] = {"version": 1, **_stack(model, model.anatomy)}
    if model.anatomy.decoder is not None:
        shapes["decoder"] = _stack(model, model.anatomy.decoder)
    if (residual := residual_layout(model)) is not None:
        shapes["residual"] = residual
    return shapes


def _stack(model: Model, anatomy: Anatomy) -> dict[str, Any]:
    layers, before = [], _layers_before(model, anatomy)
    for number, block in enumerate(b for b in model.blocks if b.anatomy is anatomy):
        layer: dict[str, Any] = dict(before[number]) if before else {}
        stock = block.stock_linears
        if changed := {path: own for path, own in block.linears.items() if own != stock[path]}:
            layer["linears"] = changed
        for mixer in filter(attention_changed, block.mixers):
            layer["attention"] = mixer.module.shape
        modules = block.module.named_modules()
        if forms := {path: m.spec for path, m in modules if isinstance(m, Factored)}:
            layer["forms"] = forms
        layers.append(layer)
    return {"blocks": anatomy.blocks, "attention": anatomy.attention, "layers": layers}


def _layers_before(model: Model, anatomy: Anatomy) -> list[dict[str, Any]]:
    """The entries of a stack in the config that a compressed checkpoint came with."""
    shapes = getattr(model.config, "secateur", None) or {}
    found: list[dict[str, Any]] = shapes.get("layers", [])
    return found if anatomy is model.anatomy else shapes.get("decoder", {}).get("layers", [])


def write_config(model: Model, tier: Written, folder: Path) -> None:
    """Write config.json, generation config, tokenizer and, where needed, the modelling code.

    What is gone must have left the model (:func:`~secateur.apply.renumbering.close_ranks`).
    """
    anatomy, config = model.anatomy, model.config
    assert anatomy is not None
    fields = config.to_dict()
    fields["dtype"] = str(model.stored).removeprefix("torch.")
    prefix = modeling_secateur.PREFIX
    stock = type(model.module).__name__.removeprefix(prefix)
    if tier == "plain":
        widths = [mlp.width for block in model.blocks for mlp in block.feed_forwards]
        if widths:
            fields[anatomy.width_key] = widths[0]  # all are equal in this tier
        fields["architectures"] = [stock]
        fields["model_type"] = config.model_type.removeprefix(PREFIX)
        for name in ("secateur", "auto_map"):  # of a compressed checkpoint that is stock again
            fields.pop(name, None)
    else:
        base = MODEL_MAPPING[type(config)].__name__.removeprefix(prefix)  # type: ignore[attr-defined]
        config_class = type(config).__name__.removeprefix(prefix)
        code = CODE.stem
        fields["model_type"] = PREFIX + config.model_type.removeprefix(PREFIX)
        fields["architectures"] = [prefix + stock]
        fields["auto_map"] = {
            "AutoConfig": f"{code}.{prefix}{config_class}",
            "AutoModel": f"{code}.{prefix}{base}",
            model.use.auto: f"{code}.{prefix}{stock}",
        }
        fields["secateur"] = layout(model)
        for file in CODE.parent.glob("*_secateur.py"):
            shutil.copy(file, folder)
    if (packed := quantization_config(linear_layers(model), model.prefix)) is not None:
        fields["quantization_config"] = packed
    fields.pop("_name_or_path", None)
    (folder / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    write_reader(model, folder)


def write_reader(model: Model, folder: Path) -> None:
    """Write the tokenizer, or image processor, and how to generate."""
    if getattr(model.module, "generation_config", None) is not None:
        # Its own save_pretrained refuses settings that many published models carry.
        text = model.module.generation_config.to_json_string()
        (folder / "generation_config.json").write_text(text)
    model.tokenizer.save_pretrained(folder)
