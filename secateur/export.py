"""Checkpoints for readers that know less: every matrix of another form multiplied out."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from secateur.checkpoint import finish, store_block, writer_for
from secateur.errors import InputError
from secateur.evaluate.judge import Questions, judge_apart
from secateur.evaluate.reload import testimony
from secateur.goal import Written
from secateur.inputs import check_out
from secateur.layers.factored_secateur import Factored
from secateur.layers.integers import packed_in
from secateur.linears import set_linear
from secateur.model import Model, Settings, has_forms
from secateur.opening import open_model, skeleton
from secateur.progress import Progress
from secateur.text import Tokens
from secateur.uses import PREFIX
from secateur.workspace import Workspace

LENGTH = 16


def export_dense(
    source: str | Path,
    out: str | Path,
    settings: Settings | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Written:
    """Multiply out every matrix of another form, write the checkpoint, and give its tier.

    What is left of the original's shapes decides that: where all are as they were, stock classes
    load the result. It is compared with memory in a fresh process before ``out`` appears. Don't use
    it to save anything: the result has the bytes of the dense shapes again.

    Raises:
        InputError: there is no such checkpoint, none of its matrices has another form, or ``out``
            exists.
        RunError: the reloaded checkpoint differs from the model in memory.
    """
    settings, progress = settings or Settings(), progress or Progress()
    source, out = str(source), Path(out).expanduser()
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
        tier: Written = "plain" if stock_again(model, settings) else "per-layer"
        writer = writer_for(model, tier, workspace.result)
        with progress.stage("writing", len(model.blocks)) as advance:
            for block in model.blocks:
                store_block(model, block, writer)
                advance(1)
        finish(model, tier, writer)
        tokens = _some_tokens(model)
        progress.say("reloading in a fresh process")
        judge_apart(
            str(workspace.result),
            Questions((), speed=False),
            settings,
            progress,
            testimony(model, tokens),
            tokens,
        )
        workspace.publish()
    return tier


def multiply_out(model: Model) -> None:
    """Put a linear layer with the dense weight in place of every other form, in place."""
    for block in model.blocks:
        for path, layer in [*block.module.named_modules()]:
            if isinstance(layer, Factored):
                with torch.device("meta"):
                    made = nn.Linear(layer.in_features, layer.out_features)
                set_linear(made, layer.dense(), layer.bias)
                block.module.set_submodule(path, made)
    shapes = getattr(model.config, "secateur", {})
    for stack in (shapes, shapes.get("decoder", {})):
        for layer in stack.get("layers", []):
            layer.pop("forms", None)


def stock_again(model: Model, settings: Settings) -> bool:
    """Whether the stock class has these very tensors, in the same order of dims."""
    if any(block.heads.pairs != sorted(block.heads.pairs) for block in model.blocks):
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
    """Any short row that no two positions of are alike."""
    row = model.use.example(1, LENGTH)
    if not model.use.reads_text:
        return row
    embeddings: Any = model.module.get_input_embeddings()
    ids = torch.arange(row.ids.shape[1]).unsqueeze(0) % len(embeddings.weight)
    return Tokens(ids, row.mask, row.labels)
