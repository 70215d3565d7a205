"""Opening a model that stays on disk, where it is too large for memory."""

import math
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from secateur.data.tasks import use_of
from secateur.io.safetensors_header import check_layers
from secateur.io.safetensors_reader import TensorReader
from secateur.layers.integers import packed_in
from secateur.models.loading import (
    check_half,
    check_lost,
    check_vocabulary,
    locate,
    open_model,
    open_reader,
    read_config,
    skeleton,
)
from secateur.models.model import Model, Settings, has_forms
from secateur.models.offload import Offload
from secateur.utils.errors import InputError, first_line
from secateur.utils.memory import free_bytes, give_back

#: share of the free memory that a model may take before it is left on disk
SHARE = 0.5
FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")


def open_fitting(
    source: str, settings: Settings, folder: Path | None = None, copies: int = 1
) -> Model:
    """Open a model whole or, where it would take over half of the free memory, block by block.

    ``settings.stream`` decides it otherwise: "on" or "off". ``folder`` is for hidden states that
    are too many for memory, too; ``copies`` is how many processes are about to open it there.

    Raises:
        InputError: the files are unusable, or it should be streamed and can't be.
    """
    if settings.stream == "off":
        return open_model(source, settings)
    shapes = skeleton(source, settings)
    reason = obstacle(shapes)
    if settings.stream == "on":
        if reason is not None:
            raise InputError(f"--stream on: {reason}. Leave it out.")
        return open_streamed(source, settings, folder)
    device, dtype = settings.torch_device(), settings.torch_dtype(shapes.stored)
    wanted = sum(math.prod(p.shape) for p in shapes.module.parameters()) * dtype.itemsize
    if reason is not None or copies * wanted <= SHARE * free_bytes(device):
        return open_model(source, settings)
    return open_streamed(source, settings, folder)


def obstacle(shapes: Model) -> str | None:
    """Why a model can't be read block by block, or None."""
    if shapes.anatomy is None:
        return "nothing says what the blocks of this family are"
    if shapes.anatomy.decoder is not None:
        return "blocks of an encoder and a decoder are not read one at a time"
    if shapes.anatomy.position_bias:
        return "the first block makes what the others need"
    if packed_in(shapes.config):
        return "packed integers are unpacked all at once"
    return None


def open_streamed(source: str, settings: Settings, folder: Path | None = None) -> Model:
    """Open a model whose blocks stay on disk, each in memory only while it is at work.

    Results are those of the whole model, bit by bit. Don't use it for a model that fits: its blocks
    are read once in every pass. ``folder`` takes hidden states that are too many for memory. In
    this process, large tensors that go give their memory back from now on.

    Raises:
        InputError: missing or damaged files, or a model whose weights are not in safetensors files
            block by block.
    """
    model = skeleton(source, settings)
    reason = obstacle(model)
    if reason is not None:
        raise InputError(f"model {source!r} can't be read block by block: {reason}.")
    assert model.anatomy is not None
    give_back()
    stored = _folder(source, settings)
    if has_forms(model.config):
        check_layers(source, stored, model.module)
    shelf = TensorReader(source, stored)
    device, dtype = settings.torch_device(), settings.torch_dtype(model.stored)
    check_half(source, model.module, {model.stored, dtype})
    model.module.eval().requires_grad_(False)
    inside = (f"{model.prefix}{model.anatomy.blocks}.",)
    home = Offload(source, model.module, shelf, inside, device=device, dtype=dtype, folder=folder)
    blocks = model.blocks
    home.house(blocks, [f"{model.prefix_of(block)}." for block in blocks])
    use = use_of(read_config(source, settings))
    check_lost(source, model.anatomy, home.left_out)
    model.offload, model.left_out = home, home.left_out
    model.tokenizer = open_reader(source, settings, use)
    if use.reads_text:
        check_vocabulary(source, model.tokenizer, model.module)
    return model


def _folder(source: str, settings: Settings) -> Path:
    """Where the files of a folder or hub id are; fetches them."""
    folder = Path(locate(source))
    if folder.is_dir():
        return folder
    try:
        return Path(
            snapshot_download(source, revision=settings.revision, allow_patterns=list(FILES))
        )
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise InputError(f"model {source!r}: {first_line(error)}") from error
