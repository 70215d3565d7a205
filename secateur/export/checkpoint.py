"""Export to checkpoints with dense weights, or with the shapes of stock classes."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from secateur.apply.save import (
    finish,
    store_block,
    store_rest,
    write_reader,
    writer_for,
)
from secateur.data.tasks import PREFIX
from secateur.data.tokens import Tokens, expanded
from secateur.evaluate.evaluator import measure_in_subprocess
from secateur.evaluate.measurements import Questions
from secateur.evaluate.verify import ReferenceOutputs, reference_outputs
from secateur.export.stock_classes import PAIRS, Stock, common_sizes, conform, held, stock_of
from secateur.io.run_directory import Workspace
from secateur.io.safetensors_writer import Writer
from secateur.layers.factored_secateur import Factored
from secateur.layers.integers import packed_in
from secateur.models.linear_ops import set_linear
from secateur.models.loading import check_out, open_model, skeleton
from secateur.models.model import Model, Settings, has_forms
from secateur.models.offload import published_name
from secateur.structure.budget import Written
from secateur.utils.errors import InputError
from secateur.utils.precision import check_exact
from secateur.utils.progress import Progress

LENGTH = 16


def export_dense(
    source: str | Path,
    out: str | Path,
    settings: Settings | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Written:
    """Multiply all forms out to dense weights, write the checkpoint, and return its tier.

    If all shapes are those of the original, stock classes load the result. It is compared with the
    model in memory in a fresh process before ``out`` appears. Don't use it to save bytes: the
    result has the bytes of dense weights.

    Raises:
        InputError: there is no such checkpoint, none of its matrices has another form, or ``out``
            exists.
        RunError: the reloaded checkpoint differs from the model in memory.
    """
    settings, progress = settings or Settings(), progress or Progress()
    source, out = str(source), expanded(out)
    check_exact(settings.torch_device(), "an export")
    check_out(out, [source])
    workspace = Workspace(out, overwrite)
    shapes = skeleton(source, settings)
    if not has_forms(shapes.config) and not packed_in(shapes.config):
        raise InputError(
            f"model {source!r}: every matrix of it is dense already; `secateur eval` measures it."
        )
    with workspace.opened({"model": source, "export": "dense"}):
        model = open_model(source, settings)
        with torch.no_grad():
            multiply_out(model)
        tier: Written = "plain" if stock_again(model) else "per-layer"
        writer = writer_for(model, tier, workspace.result)
        with progress.stage("writing", len(model.blocks)) as advance:
            for block in model.blocks:
                store_block(model, block, writer)
                advance(1)
        finish(model, tier, writer)
        tokens = _some_tokens(model)
        progress.say("reloading in a fresh process")
        measure_in_subprocess(
            str(workspace.result),
            Questions((), speed=False),
            settings,
            progress,
            ReferenceOutputs(reference_outputs(model, tokens), tokens),
        )
        workspace.publish()
    return tier


@dataclass(frozen=True)
class Plain:
    """A checkpoint for stock classes.

    Attributes:
        model_type: what transformers calls them.
        notes: what was done to the model to have their shapes.
        compared: what the reloaded checkpoint was compared by: tokens that it writes, and logits by
            number format and attention.
    """

    model_type: str
    notes: tuple[str, ...]
    compared: tuple[str, ...] = ()


def export_plain(
    source: str | Path,
    out: str | Path,
    settings: Settings | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Plain:
    """Write a checkpoint whose layers have equal shapes for stock classes of transformers.

    Matrices of other forms are multiplied out. Rotary pairs that all heads share become a longrope,
    the softmax scale is multiplied into the queries, and keys and values of different width become
    those of a class that supports them. The result is compared with the model in memory in a fresh
    process before ``out`` appears. Don't use it for layers of different shapes, which it refuses.

    Raises:
        InputError: there is no such checkpoint, it is plain already, no stock class has its shapes,
            or ``out`` exists.
        RunError: the reloaded checkpoint differs from the model in memory.
    """
    settings, progress = settings or Settings(), progress or Progress()
    source, out = str(source), expanded(out)
    check_exact(settings.torch_device(), "an export")
    check_out(out, [source])
    workspace = Workspace(out, overwrite)
    if not skeleton(source, settings).narrowed:
        raise InputError(
            f"model {source!r}: stock classes open it as it is; `secateur eval` measures it."
        )
    with workspace.opened({"model": source, "export": "plain"}):
        model = open_model(source, settings)
        with torch.no_grad():
            count = multiply_out(model)
        stock = stock_of(model, common_sizes(model))
        made = Plain(str(stock.module.config.model_type), _notes(stock, count))
        for note in made.notes:
            progress.say(f"note: {note}")
        conform(model, stock)
        store_as(model, stock, workspace.result, progress)
        tokens = _some_tokens(model)
        said = _comparable(reference_outputs(model, tokens), stock)
        made = replace(made, compared=tuple(said))
        progress.say(f"reloading in a fresh process, to compare {', '.join(said)}")
        nothing = Questions((), speed=False)
        measure_in_subprocess(
            str(workspace.result), nothing, settings, progress, ReferenceOutputs(said, tokens)
        )
        workspace.publish()
    return made


def _comparable(said: dict[str, Tensor], stock: Stock) -> dict[str, Tensor]:
    """The comparisons that the stock class supports, too."""
    if stock.module._supports_sdpa:
        return said
    said = {name: tensor for name, tensor in said.items() if not name.endswith(".sdpa")}
    if "logits.float32.eager" in said:  # its softmax rounds to bfloat16, where ours does not
        said.pop("logits.bfloat16.eager")
    return said


def _notes(stock: Stock, multiplied: int) -> tuple[str, ...]:
    notes = []
    if multiplied:
        notes.append(f"{multiplied} matrices of another form are multiplied out")
    if stock.pairs is not None:
        notes.append(f"{len(stock.pairs)} rotary pairs are kept, by longrope factors")
    if stock.ratio != 1:
        notes.append(f"the scale of scores is in the queries, times {stock.ratio:.6g}")
    if not stock.module._supports_sdpa:
        kind = type(stock.module).__name__
        notes.append(f"{kind}, which has such widths, knows no fused attention; it is slower")
        notes.append(
            f"{kind} is compared under eager attention only, and not in bfloat16 where float32 is "
            f"compared"
        )
    return tuple(notes)


class _Chosen(Writer):
    """A writer for the tensors of a stock class."""

    def add(self, name: str, tensor: Tensor) -> None:
        if not name.endswith(PAIRS):
            super().add(name, tensor)


def store_as(model: Model, stock: Stock, folder: Path, progress: Progress) -> None:
    """Write a model that conforms to a stock class as that class.

    Raises:
        InputError: a weight is beyond the largest number of the stored format.
    """
    writer = _Chosen(folder, rename=published_name(stock.module))
    there = set(held(model))
    with progress.stage("writing", len(model.blocks)) as advance:
        for block in model.blocks:
            store_block(model, block, writer)
            advance(1)
    store_rest(model, writer)
    for name, tensor in stock.module.state_dict().items():
        if name not in there:  # a bias that the class has for all layers or none
            writer.add(name, torch.zeros(tensor.shape, dtype=model.stored))
    writer.finish()
    writer.settle()
    fields = stock.module.config.to_dict()
    fields["dtype"] = str(model.stored).removeprefix("torch.")
    fields["architectures"] = [type(stock.module).__name__]
    fields.pop("_name_or_path", None)
    (folder / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    write_reader(model, folder)


def multiply_out(model: Model) -> int:
    """Replace all forms by linear layers with dense weights, and return their number."""
    count = 0
    for block in model.blocks:
        for path, layer in [*block.module.named_modules()]:
            if isinstance(layer, Factored):
                with torch.device("meta"):
                    made = nn.Linear(layer.in_features, layer.out_features)
                set_linear(made, layer.dense(), layer.bias)
                block.module.set_submodule(path, made)
                count += 1
    shapes = getattr(model.config, "secateur", {})
    for stack in (shapes, shapes.get("decoder", {})):
        for layer in stack.get("layers", []):
            layer.pop("forms", None)
    return count


def stock_again(model: Model) -> bool:
    """Whether the stock class has exactly these tensors, with the same order of dimensions."""
    if any(block.layout.pairs != sorted(block.layout.pairs) for block in model.blocks):
        return False
    fields = model.config.to_dict()
    model_type = str(fields.pop("model_type")).removeprefix(PREFIX)
    fields.pop("secateur", None)
    config = AutoConfig.for_model(model_type, **fields)
    with torch.device("meta"):
        stock = model.use.opener.from_config(config)
    wanted, found = ({n: t.shape for n, t in m.state_dict().items()} for m in (stock, model.module))
    return bool(wanted == found)


def _some_tokens(model: Model) -> Tokens:
    """A short row of different tokens."""
    row = model.use.example(1, LENGTH)
    if not model.use.reads_text:
        return row
    embeddings: Any = model.module.get_input_embeddings()
    ids = torch.arange(row.ids.shape[1]).unsqueeze(0) % len(embeddings.weight)
    return Tokens(ids, row.mask, row.labels)
