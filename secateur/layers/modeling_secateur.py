"""Stock transformers models with narrower layers.

This file is written beside the weights of every checkpoint whose layers differ in shape, so it
stands alone: it imports torch, transformers and the ``*_secateur`` files beside it. The
shapes are read from the ``secateur`` block of ``config.json``. A class is the stock class with some
modules replaced: ``SecateurLlamaForCausalLM`` is ``LlamaForCausalLM``, ``SecateurOPTModel`` is
``OPTModel`` and so on; they are made on request (``__getattr__`` at the end), so no family is named
here.
"""

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .attention_secateur import linear, narrow_attention
from .factored_secateur import Factored
from .forms_secateur import layer_class

PREFIX = "Secateur"


class SlicedBlock(nn.Module):
    """A stock block whose residual stream changes its basis behind attention and behind the MLP.

        x ← x S + attention(norm(x)),   then   x ← x S' + mlp(norm(x))

    A shortcut S that is None stands for the identity. ``places`` names the modules.
    """

    places: dict[str, str]
    attention_shortcut: nn.Parameter | None
    mlp_shortcut: nn.Parameter | None

    def behind_attention(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """The stream between attention and MLP."""
        read = self.get_submodule(self.places["attention_norm"])(hidden_states)
        branch, _ = self.get_submodule(self.places["attention"])(read, **kwargs)
        branch = getattr(self, "resid_attn_dropout", nn.Identity())(branch)
        return _joined(hidden_states, self.attention_shortcut, branch)

    def behind_mlp(self, hidden_states: Tensor) -> Tensor:
        """The stream behind the block, from the one between."""
        read = self.get_submodule(self.places["mlp_norm"])(hidden_states)
        branch = self.get_submodule(self.places["mlp"])(read)
        branch = getattr(self, "resid_mlp_dropout", nn.Identity())(branch)
        return _joined(hidden_states, self.mlp_shortcut, branch)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return self.behind_mlp(self.behind_attention(hidden_states, **kwargs))


def _joined(hidden_states: Tensor, shortcut: Tensor | None, branch: Tensor) -> Tensor:
    return (hidden_states if shortcut is None else hidden_states @ shortcut) + branch


def sliced(block: nn.Module, places: dict[str, str]) -> SlicedBlock:
    """Make a stock block, in place, a SlicedBlock that still computes the same."""
    changed: Any = block
    changed.__class__ = type("Sliced" + type(block).__name__, (SlicedBlock, type(block)), {})
    changed.places = dict(places)
    changed.register_parameter("attention_shortcut", None)
    changed.register_parameter("mlp_shortcut", None)
    return changed  # type: ignore[no-any-return]


def shorten(norm: Any, size: int) -> None:
    """Let an RMS norm without weights read a sliced stream, and normalise it as before.

    For d coordinates before, x / √(Σ x² / d + ε) = √(d/k) · x / √(Σ x² / k + ε d/k). The norm takes
    ε d/k; √(d/k) is in what reads it, where no rounding of one number scales everything.
    """
    before = norm.weight
    norm.variance_epsilon = norm.variance_epsilon * len(before) / size
    norm.weight = nn.Parameter(torch.ones_like(before[:size]), before.requires_grad)


def resized(old: nn.Module, outputs: int, inputs: int, bias: bool) -> nn.Module:
    """An uninitialised module of the same kind as ``old`` with other sizes."""
    if isinstance(old, Conv1D):
        return AnyConv1D(outputs, inputs)
    return linear(inputs, outputs, bias=bias)


class AnyConv1D(Conv1D):
    """The stock Conv1D, but that it may have no inputs."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__(outputs, inputs)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.t(), self.bias)


def narrow(model: PreTrainedModel, shapes: dict[str, Any]) -> None:
    """Replace the modules of ``model`` whose shapes ``shapes`` (the config's block) changes."""
    if "decoder" in shapes:
        narrow(model, shapes["decoder"])
    blocks: Any = model.base_model.get_submodule(shapes["blocks"])
    for block, layer in zip(blocks, shapes["layers"], strict=True):
        for path, size in layer.get("linears", {}).items():
            old = block.get_submodule(path)
            block.set_submodule(path, resized(old, size["out"], size["in"], size["bias"]))
        if "attention" in layer:
            path = shapes["attention"]
            stock = block.get_submodule(path)
            block.set_submodule(path, narrow_attention(stock, layer["attention"]))
        forms = layer.get("forms", {})
        if not isinstance(forms, dict):
            raise ValueError(f"forms: {str(forms)[:200]} should be specs by the paths of linears.")
        made = {path: factored(block, path, spec) for path, spec in forms.items()}
        for path, form in made.items():
            form.follow(made)
            block.set_submodule(path, form)
    if "residual" in shapes:
        _slice(model, blocks, shapes["residual"])


def factored(block: nn.Module, path: str, spec: Any) -> Factored:
    """An uninitialised layer of another form in place of one of a block's linears.

    Raises:
        ValueError: the spec is none, or not for the linear that is there.
    """
    try:
        old = block.get_submodule(path)
    except AttributeError:
        old = None
    if not isinstance(old, (nn.Linear, Conv1D)):
        raise ValueError(f"forms: {path!r} is no linear layer of a {type(block).__name__}.")
    made = layer_class(spec)  # which refuses what is out of bounds
    sizes = old.weight.shape if isinstance(old, nn.Linear) else old.weight.shape[::-1]
    there = (*sizes, old.bias is not None)
    if there != (spec["outputs"], spec["inputs"], spec["bias"]):
        raise ValueError(f"forms: outputs, inputs and bias of {path!r} are {there}, not as {spec}.")
    return made(spec)


def _slice(model: PreTrainedModel, blocks: Any, residual: dict[str, Any]) -> None:
    """Make room for the shortcuts, and let norms, embedding and head have the stream's width."""
    base: Any = model.base_model
    size, places = residual["size"], residual["places"]
    shorten(base.get_submodule(residual["last_norm"]), size)
    for stock in blocks:
        block = sliced(stock, places)
        shorten(block.get_submodule(places["attention_norm"]), size)
        shorten(block.get_submodule(places["mlp_norm"]), size)
        block.attention_shortcut = nn.Parameter(torch.empty(size, size))
        block.mlp_shortcut = nn.Parameter(torch.empty(size, size))
    # A block's class has another name now, by which it would not be known as one piece.
    model._no_split_modules = {
        *(model._no_split_modules or ()),
        *(type(b).__name__ for b in blocks),
    }
    old = base.get_input_embeddings()
    base.set_input_embeddings(nn.Embedding(old.num_embeddings, size, old.padding_idx))
    head: Any = model.get_output_embeddings()
    if head is not None:
        made = linear(size, head.out_features, bias=head.bias is not None)
        model.set_output_embeddings(made)


def _narrow_config(stock: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    fields = {"model_type": f"secateur_{stock.model_type}", "__module__": __name__}
    made: Any = type(PREFIX + stock.__name__, (stock,), fields)
    made.register_for_auto_class()
    return made  # type: ignore[no-any-return]


def _narrow_model(stock: Any) -> type[PreTrainedModel]:
    config_class = __getattr__(PREFIX + stock.config_class.__name__)

    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        stock.__init__(self, config, *args, **kwargs)
        narrow(self, config.secateur)

    @classmethod  # type: ignore[misc]
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        """As the stock class does, but for weights missing in blocks: it would make them up.

        Elsewhere they may well be missing, as poolers are where a checkpoint has another head.
        """
        asked = kwargs.pop("output_loading_info", False)
        found, loaded = super(made, cls).from_pretrained(*args, output_loading_info=True, **kwargs)
        shapes = found.config.secateur
        stacks = [f".{s['blocks']}." for s in (shapes, shapes.get("decoder")) if s]
        missing = sorted(k for k in loaded["missing_keys"] if any(s in f".{k}" for s in stacks))
        if missing and not asked:
            raise ValueError(f"{len(missing)} weights are missing, {missing[0]} first.")
        return (found, loaded) if asked else found

    fields = {"__init__": build, "__module__": __name__, "config_class": config_class}
    fields["from_pretrained"] = from_pretrained
    made: Any = type(PREFIX + stock.__name__, (stock,), fields)
    made.register_for_auto_class(_auto_class(stock))
    return made  # type: ignore[no-any-return]


def _auto_class(stock: Any) -> str:
    for use in ("MaskedLM", "ImageClassification"):
        if stock.__name__.endswith(f"For{use}"):
            return f"AutoModelFor{use}"
    if stock.__name__.endswith("ForConditionalGeneration"):
        return "AutoModelForSeq2SeqLM"
    generates = issubclass(stock, transformers.GenerationMixin)
    return "AutoModelForCausalLM" if generates else "AutoModel"


def __getattr__(name: str) -> Any:
    """Make ``Secateur<stock class>`` for a class of transformers, once."""
    if name in globals():  # asked for by a name that is made up here, not by an attribute
        return globals()[name]
    stock = getattr(transformers, name.removeprefix(PREFIX), None)
    if not name.startswith(PREFIX) or not isinstance(stock, type):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    make: Any = _narrow_config if issubclass(stock, PreTrainedConfig) else _narrow_model
    globals()[name] = make(stock)
    return globals()[name]
