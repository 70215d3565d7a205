"""Export of a checkpoint to a GGUF file, checked in llama.cpp."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from secateur.data.tokens import expanded
from secateur.export.checkpoint import multiply_out
from secateur.export.gguf.check import Finding, available, compare, in_llama, reference
from secateur.export.gguf.shapes import Layout, check_family, layout_of
from secateur.export.gguf.tokens import Vocabulary, vocabulary
from secateur.export.gguf.writer import FORMATS, QUANTIZED, Written, write
from secateur.models.loading import check_out, open_model, read_config
from secateur.models.model import Model, Settings
from secateur.utils.errors import InputError, nearest
from secateur.utils.precision import check_exact
from secateur.utils.progress import Progress

AUTO = "auto"
SUFFIX = ".gguf"
TYPES: Sequence[str] = (AUTO, *FORMATS, *QUANTIZED)
STORED: dict[torch.dtype, Written] = {torch.float16: "f16", torch.bfloat16: "bf16"}
INSTALL = "pip install 'secateur[gguf]'"


@dataclass(frozen=True)
class Exported:
    """The file that was written.

    Attributes:
        architecture: by which llama.cpp reads it.
        kind: the format of its matrices.
        bytes: of the file.
        finding: how far llama.cpp is from the model; None where that was not asked.
    """

    architecture: str
    kind: str
    bytes: int
    finding: Finding | None


def export_gguf(
    source: str | Path,
    out: str | Path,
    kind: str = AUTO,
    settings: Settings | None = None,
    overwrite: bool = False,
    tokenizer: bool = True,
    checked: bool = True,
    progress: Progress | None = None,
) -> Exported:
    """Write a checkpoint, compressed or not, as one GGUF file, and run it in llama.cpp.

    Its logits are compared with those of the model in transformers, and the file appears under its
    name only if they agree. A file with few-bit blocks is compared twice: before its matrices are
    quantized, where almost nothing may differ, and in the end. Don't use it for vLLM or
    transformers, which read the checkpoint itself.

    Args:
        source: folder or hub id of a model.
        out: the file.
        kind: format of the matrices, one of :data:`TYPES`; "auto" is the stored one.
        settings: how the model is opened; it computes in float32.
        overwrite: replace the file.
        tokenizer: write the tokenizer, too.
        checked: run the file.
        progress: who is told how far it is.

    Raises:
        InputError: no architecture of llama.cpp holds the model or its tokenizer, or a library is
            missing, or ``out`` exists.
        RunError: llama.cpp says something else than the model.
    """
    settings = replace(settings or Settings(), dtype="float32")
    check_exact(settings.torch_device(), "an export")
    progress, out, source = progress or Progress(), expanded(out), str(source)
    check_request(out, kind, overwrite, checked)
    check_out(out, [source])
    check_family(read_config(source, settings))
    model = open_model(source, settings)
    kind = STORED.get(model.stored, "f32") if kind == AUTO else kind
    layout, words = prepared(model, kind, tokenizer, progress)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        given = (model, layout, words, kind)
        made, finding = make(*given, checked=checked, folder=Path(folder), progress=progress)
        made.replace(out)
    if finding is None:
        progress.say(
            "WARNING: unchecked: llama.cpp has not run this file; it may load and be wrong"
        )
    return Exported(layout.architecture.name, kind, out.stat().st_size, finding)


def check_request(out: Path, kind: str, overwrite: bool, checked: bool) -> None:
    """Refuse impossible requests before any weight is read.

    Raises:
        InputError: an unknown type, a place that is taken or is none, or a missing library.
    """
    if kind not in TYPES:
        raise InputError(f"unknown --type {kind!r}. {nearest(kind, TYPES)}")
    if out.suffix != SUFFIX or out.is_dir():
        raise InputError(
            f"output {str(out)!r}: GGUF is one file; give it a name, e.g. "
            f"{str(out.with_suffix(SUFFIX))!r}."
        )
    if not out.absolute().parent.is_dir():
        raise InputError(f"output {str(out)!r}: there is no folder {str(out.parent)!r}.")
    if out.exists() and not overwrite:
        raise InputError(f"output {str(out)!r} exists; choose another or add --overwrite.")
    if find_spec("gguf") is None:
        raise InputError(f"GGUF files need the library gguf: {INSTALL}")
    if kind in QUANTIZED and not available():
        raise InputError(
            f"--type {kind} is made by llama.cpp's quantizer, which is not installed ({INSTALL}; "
            f"it compiles for some minutes). --type q8_0 needs none."
        )
    if checked and not available():
        raise InputError(
            f"every file is run in llama.cpp before it counts, and llama-cpp-python is not "
            f"installed: {INSTALL} (it compiles for some minutes). --unchecked writes the file "
            f"without that, which may load and be wrong."
        )


def prepared(
    model: Model, kind: str, tokenizer: bool, progress: Progress
) -> tuple[Layout, Vocabulary | None]:
    """The model and tokenizer as the file represents them, with dense matrices as exact as the
    file.

    Raises:
        InputError: no architecture of llama.cpp holds the one or the other.
    """
    embedding: Any = model.module.get_input_embeddings()
    with torch.no_grad():
        multiply_out(model)
        layout = layout_of(model)
        words = vocabulary(model.tokenizer, len(embedding.weight)) if tokenizer else None
        dtype = {"f16": torch.float16, "bf16": torch.bfloat16}.get(_first(model, kind))
        if dtype is not None:
            for parameter in model.module.parameters():
                if parameter.dim() > 1:
                    parameter.data = parameter.data.to(dtype).to(parameter.dtype)
    if layout.window is not None:
        progress.say(
            f"note: tokens more than {layout.window} apart don't see each other in this model, and "
            f"in llama.cpp they would; the file's context ends there"
        )
    return layout, words


def _first(model: Model, kind: str) -> Written:
    """The format in which a file is compared exactly."""
    exact = kind in FORMATS and kind != "q8_0"
    return kind if exact else STORED.get(model.stored, "f32")  # type: ignore[return-value]


def make(
    model: Model,
    layout: Layout,
    words: Vocabulary | None,
    kind: str,
    *,
    checked: bool,
    folder: Path,
    progress: Progress,
) -> tuple[Path, Finding | None]:
    """Write the file to a folder and run it in llama.cpp."""
    told = reference(model) if checked else None
    first = _first(model, kind)
    asked = None if words is None else model.tokenizer
    finding, path = None, folder / f"{first}{SUFFIX}"

    def written(as_kind: Written) -> Path:
        made = folder / f"{as_kind}{SUFFIX}"
        with progress.stage(f"writing {as_kind}", 2 * count(model)) as advance:
            write(model, layout, words, as_kind, made, advance=advance)
        return made

    if kind != "q8_0" or told is not None:
        path = written(first)
    if told is not None:
        progress.say(f"running the file ({first}) in llama.cpp")
        finding = compare(path, first, told, asked)
    if kind == first:
        return path, finding
    last = folder / f"{kind}{SUFFIX}"
    if kind == "q8_0":
        written("q8_0")
    else:
        progress.say(f"llama.cpp makes it {kind}")
        request = {"file": str(path.absolute()), "out": str(last.absolute())}
        (folder / "quantize").mkdir()
        in_llama(folder / "quantize", {**request, "ftype": QUANTIZED[kind]})
    if told is not None:
        progress.say(f"running the file ({kind}) in llama.cpp")
        finding = compare(last, kind, told, asked)
    return last, finding


def count(model: Model) -> int:
    """Approximate number of tensors, for the progress bar."""
    return 3 + 12 * len(model.blocks)
