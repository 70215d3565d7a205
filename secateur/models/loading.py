"""Open a folder or hub id: as a model with weights, as shapes alone, or its config."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file

from secateur.data import bundled
from secateur.data.tasks import PREFIX, Use, use_of
from secateur.data.tokens import expanded
from secateur.families import Anatomy, find
from secateur.io.safetensors_header import check_layers
from secateur.layers.factored_secateur import Factored
from secateur.layers.integers import unpack
from secateur.models.config_checks import vet_config, vet_shapes
from secateur.models.model import FAULTS_OF_CONFIG, Model, Settings, anatomy_of, has_forms
from secateur.utils.errors import InputError, first_line, words

DEMO = "demo"
#: what libraries raise of files that are not what they should be
FAULTS = (*FAULTS_OF_CONFIG, OSError, ImportError, SafetensorError, StrictDataclassError)


def locate(source: str | Path) -> str:
    """A folder's path, a hub id, or for "demo" the model inside this package."""
    folder = expanded(source)
    if folder.is_dir():
        return str(folder)
    return str(bundled.model_path()) if str(source) == DEMO else str(source)


def check_out(out: Path, sources: list[str]) -> None:
    """Refuse an output that would replace what the run reads.

    Raises:
        InputError: ``out`` is, or holds, the model or a text.
    """
    for source in sources:
        found = Path(locate(source))
        if found.exists() and found.resolve().is_relative_to(out.resolve()):
            raise InputError(f"output {str(out)!r} holds {source!r}, which the run reads.")


def skeleton(source: str, settings: Settings) -> Model:
    """A model without storage, built from its config: shapes and units, no numbers, no tokenizer.

    Raises:
        InputError: there is no such model, or transformers cannot build it.
    """
    config = read_config(source, settings)
    use, folder = use_of(config), Path(locate(source))
    try:
        with torch.device("meta"):
            module = use.opener.from_config(config, trust_remote_code=settings.trust_remote_code)
    except FAULTS as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"model {source!r}: transformers cannot build a {use.what} from its config "
            f"(model_type {config.model_type!r}): {words(first_line(error))}"
        ) from error
    if folder.is_dir():
        vet_shapes(source, folder, module)
    family = find(config.model_type.removeprefix(PREFIX))
    if family is not None and not getattr(config, family.tied, True):
        head: Any = module.get_output_embeddings()
        if head is not None and head.weight is module.get_input_embeddings().weight:
            head.weight = nn.Parameter(torch.empty_like(head.weight))
    stored = getattr(config, "dtype", None) or torch.float32
    nothing: Any = None
    return Model(source, module, nothing, stored, anatomy_of(config))


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
    common = {"revision": settings.revision}
    try:
        path = cached_file(found, CONFIG_NAME, **common)
        vet_config(source, Path(str(path)), settings.trust_remote_code)
        config = AutoConfig.from_pretrained(
            found, trust_remote_code=settings.trust_remote_code, **common
        )
        use_of(config), anatomy_of(config)  # what they read of it is there
        return config
    except FAULTS as error:
        if isinstance(error, InputError):
            raise
        hint = "" if folder.is_dir() else " Check the name and the network, or give a folder."
        raise InputError(f"model {source!r}: {words(first_line(error))}{hint}") from error


def open_model(source: str | Path, settings: Settings | None = None) -> Model:
    """Load a checkpoint with its tokenizer and check that it is whole.

    Use it for any folder or hub id that transformers opens. The whole model is held in memory.

    Raises:
        InputError: missing or corrupt files, weights that are missing, NaN or infinite, or a
            tokenizer with more tokens than the model has embeddings.
    """
    settings, source = settings or Settings(), str(source)
    config = read_config(source, settings)
    folder = Path(locate(source))
    if folder.is_dir():
        shapes = skeleton(source, settings).module
        if has_forms(config):
            check_layers(source, folder, shapes)
    module, loaded = _read(source, config, settings)
    _check_whole(source, config, module, loaded)
    anatomy = anatomy_of(config)
    check_lost(source, anatomy, loaded["unexpected_keys"])
    unpack(module)
    stored = module.dtype
    check_half(source, module, {stored, settings.torch_dtype(stored)})
    module = module.to(settings.torch_device()).eval()
    cast(module, settings.torch_dtype(stored))
    module.requires_grad_(False)
    _check_numbers(source, module)
    reader = open_reader(source, settings, use_of(config))
    if use_of(config).reads_text:
        check_vocabulary(source, reader, module)
    return Model(
        source,
        module,
        reader,
        stored,
        anatomy,
        left_out=tuple(sorted(loaded["unexpected_keys"])),
    )


def _read(source: str, config: Any, settings: Settings) -> tuple[Any, dict[str, Any]]:
    """The module that transformers loads, and what it says of missing and other keys.

    Raises:
        InputError: it can't be loaded.
    """
    try:
        opened: Any = use_of(config).opener.from_pretrained(
            locate(source),
            config=config,
            dtype="auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported by _check_whole, with the shapes
            use_safetensors=True,  # others are pickles, which run code when they are opened
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
        )
    except FAULTS as error:
        raise InputError(f"model {source!r}: {_reason(error)}") from error
    module, loaded = opened
    return module, loaded


def _check_whole(source: str, config: Any, module: Any, loaded: dict[str, Any]) -> None:
    """Refuse a checkpoint whose tensors are others than its config asks for.

    Raises:
        InputError: a tensor has another shape, or is missing.
    """
    if loaded["mismatched_keys"]:
        name, found, wanted = sorted(loaded["mismatched_keys"])[0]
        raise InputError(
            f"model {source!r}: {name} has shape {tuple(found)}, but config.json asks for "
            f"{tuple(wanted)}; they are not from the same model."
        )
    if loaded["missing_keys"]:
        missing, made = sorted(loaded["missing_keys"]), type(module).__name__
        if made not in (named := config.architectures or [made]):
            raise InputError(
                f"model {source!r} is a {named[0]}, of which {made} would lack {len(missing)} "
                f"weights, {missing[0]} first; of this family {use_of(config).what}s are served."
            )
        raise InputError(
            f"model {source!r}: {len(missing)} weights are missing from the checkpoint, "
            f"{missing[0]} first. Fetch the model again."
        )


def _check_numbers(source: str, module: Any) -> None:
    """Refuse weights that are not finite, and layers of other forms that are damaged.

    Raises:
        InputError: a tensor holds NaN or infinity, or a layer's codes are out of range.
    """
    for name, parameter in module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise InputError(
                f"model {source!r}: {name} holds NaN or infinite numbers; the file is damaged, or "
                f"the training that wrote it had diverged."
            )
    for name, layer in module.named_modules():
        if isinstance(layer, Factored) and layer.densified:
            try:
                layer.dense()
            except ValueError as error:
                raise InputError(
                    f"model {source!r}: {name} is damaged: {error} Fetch the model again."
                ) from error


def check_lost(source: str, anatomy: Anatomy | None, left_out: Iterable[str]) -> None:
    """Refuse weight files with more in their blocks than the config has a place for.

    Raises:
        InputError: a tensor that is left out is one of a block's.
    """
    inside = [] if anatomy is None else [f".{stack.blocks}." for stack in anatomy.stacks]
    lost = [k for k in left_out if any(name in f".{k}" for name in inside)]
    if lost:
        raise InputError(
            f"model {source!r}: config.json has no place for {len(lost)} tensors of the weight "
            f"files, {min(lost)} first; they are not from the same model."
        )


def check_half(source: str, module: PreTrainedModel, dtypes: set[torch.dtype]) -> None:
    """Refuse float16 where some weights of a family must stay wider (T5's MLPs overflow in it).

    Raises:
        InputError: one of the number formats is float16.
    """
    wide = getattr(module, "_keep_in_fp32_modules", None)
    if wide and torch.float16 in dtypes:
        raise InputError(
            f"model {source!r}: {', '.join(wide)} of a {module.config.model_type} must not be "
            f"float16, in which their outputs overflow; store the model as bfloat16 or float32, "
            f"and leave --dtype float16 out."
        )


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Convert the parameters in place; buffers such as rotary frequencies keep their precision."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


def open_reader(source: str, settings: Settings, use: Use) -> Any:
    """Load the tokenizer, or image processor, of a folder or hub id.

    Raises:
        InputError: there is none, or it is damaged or empty.
    """
    options = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    try:
        return use.open_reader(locate(source), **options)
    except InputError:  # one kind of ValueError
        raise
    except FAULTS as error:
        what = "tokenizer" if use.reads_text else "image processor"
        raise InputError(
            f"model {source!r}: its {what} files are missing or damaged ({first_line(error)}). "
            f"Fetch them again, from the model that the weights are from."
        ) from error


def check_vocabulary(source: str, tokenizer: Any, module: PreTrainedModel) -> None:
    """Refuse a tokenizer with ids that the model has no embedding for."""
    embeddings: Any = module.get_input_embeddings()
    rows, highest = embeddings.weight.shape[0], max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise InputError(
            f"model {source!r}: the tokenizer has ids up to {highest} but the model embeds only "
            f"{rows} tokens; they are not from the same model."
        )


def _reason(error: Exception) -> str:
    if isinstance(error, SafetensorError):
        return f"a weight file is corrupt or cut short ({first_line(error)}). Fetch it again."
    return first_line(error)
