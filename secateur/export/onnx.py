"""Export of a model to an ONNX graph, checked in onnxruntime."""

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.data.tasks import use_of
from secateur.data.tokens import Tokens, expanded
from secateur.evaluate.verify import TOLERANCE, attend_by
from secateur.models.loading import check_out, open_model, read_config
from secateur.models.model import Model, Settings
from secateur.utils.errors import InputError, RunError, first_line
from secateur.utils.progress import Progress

LIBRARIES = ("onnx", "onnxruntime", "onnxscript")
INSTALL = "pip install 'secateur[onnx]'"
SUFFIX = ".onnx"
#: what onnxruntime raises beside RuntimeError
FAILURES = (
    *("EPFail", "EngineError", "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf"),
    *("NoModel", "NoSuchFile", "NotFound", "NotImplemented", "RuntimeException"),
)
#: batch and length of what the graph is traced with, then of what it is asked
TRACED = (2, 12)
ASKED = ((1, 7), (3, 20))
APART = 2**30


@dataclass(frozen=True)
class Graph:
    """The graph that was written.

    Attributes:
        bytes: of all its files.
        files: their names; weights of more than ``APART`` bytes have one of their own.
        difference: largest of a logit to the model's, over the spread of all.
    """

    bytes: int
    files: tuple[str, ...]
    difference: float


class _Logits(nn.Module):
    """A model as a function of tensors, without a cache."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.module, self.writes = model.module, model.use.writes

    def forward(self, read: Tensor, mask: Tensor | None = None) -> Tensor:
        module: Any = self.module
        given: dict[str, Any] = {"use_cache": False} if self.writes else {}
        if mask is not None:
            given = {"attention_mask": mask, **given}
        output: Any = module(read, **given)
        assert isinstance(output.logits, Tensor)
        return output.logits


def export_onnx(
    source: str | Path,
    out: str | Path,
    settings: Settings | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Graph:
    """Write a checkpoint, compressed or not, as an ONNX graph in float32, and run it.

    It takes ``input_ids`` and ``attention_mask`` (or ``pixel_values``) of any batch and length and
    gives ``logits``. onnxruntime's answers on two lengths are compared with the model's, and the
    file appears under its name only when they agree. There is no cache: for generation of long
    texts export to GGUF, or serve the checkpoint itself.

    Raises:
        InputError: a library is missing, the model is of two parts, or ``out`` exists.
        RunError: torch cannot trace it, or onnxruntime says something else than the model.
    """
    settings = replace(settings or Settings(), dtype="float32", device="cpu")
    progress, out, source = progress or Progress(), expanded(out), str(source)
    check_request(out, overwrite)
    check_out(out, [source])
    use = use_of(read_config(source, settings))
    if use.auto == "AutoModelForSeq2SeqLM":
        raise InputError(
            f"model {source!r}: a {use.what} is two graphs, which is not served; its checkpoint is "
            f"read by transformers."
        )
    model = open_model(source, settings)
    attend_by(model.module, "sdpa" if model.module._supports_sdpa else "eager")
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        made = Path(folder) / out.name
        progress.say("tracing the model")
        _trace(model, made)
        progress.say("running the graph in onnxruntime")
        difference = _check(model, made)
        files = sorted(Path(folder).iterdir(), key=lambda file: file == made)  # the graph last
        for file in files:
            file.replace(out.parent / file.name)
        if all(file.name != _weights(out).name for file in files):
            _weights(out).unlink(missing_ok=True)  # of the graph that was overwritten
    written = [out.parent / file.name for file in files]
    size = sum(file.stat().st_size for file in written)
    return Graph(size, tuple(file.name for file in written), difference)


def _weights(out: Path) -> Path:
    """The second file of a graph, if its weights are separate."""
    return out.with_name(f"{out.name}.data")


def check_request(out: Path, overwrite: bool) -> None:
    """Refuse impossible requests before any weight is read.

    Raises:
        InputError: a place that is taken or is none, or a missing library.
    """
    if out.suffix != SUFFIX or out.is_dir():
        raise InputError(
            f"output {str(out)!r}: a graph is one file; give it a name, e.g. "
            f"{str(out / 'model.onnx')!r}."
        )
    if not out.absolute().parent.is_dir():
        raise InputError(f"output {str(out)!r}: there is no folder {str(out.parent)!r}.")
    taken = [path for path in (out, _weights(out)) if path.exists()]
    if taken and not overwrite:
        raise InputError(f"output {str(taken[0])!r} exists; choose another or add --overwrite.")
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if missing:
        raise InputError(f"ONNX graphs need {' and '.join(missing)}: {INSTALL}")


def _given(model: Model, batch: int, length: int) -> dict[str, Tensor]:
    """Rows of different inputs; for text, the last one is padded at its end."""
    tokens: Tokens = model.use.example(batch, length)
    if not model.use.reads_text:
        generator = torch.Generator().manual_seed(length)
        return {"pixel_values": torch.randn(tokens.ids.shape, generator=generator)}
    embeddings: Any = model.module.get_input_embeddings()
    ids = torch.arange(batch * length).view(batch, length) * 31 % len(embeddings.weight)
    mask = torch.ones_like(ids)
    mask[-1, length - (length // 4 if batch > 1 else 0) :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _trace(model: Model, path: Path) -> None:
    given = _given(model, *TRACED)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    text = model.use.reads_text
    shapes = tuple({0: batch, 1: length} if text else {0: batch} for _ in given)
    try:
        with _silence():
            torch.onnx.export(
                _Logits(model).eval(),
                tuple(given.values()),
                str(path),
                dynamo=True,
                input_names=list(given),
                output_names=["logits"],
                dynamic_shapes=shapes,
                verbose=False,
                external_data=sum(p.nbytes for p in model.module.parameters()) > APART,
            )
    except torch.onnx.OnnxExporterError as error:
        raise RunError(
            f"torch cannot make a graph of {type(model.module).__name__}: {first_line(error)} "
            f"Nothing was kept."
        ) from error


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Hide the exporter's own messages."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _failures() -> tuple[type[Exception], ...]:
    """The exceptions of onnxruntime, which have no common base class except Exception."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = (getattr(state, name, None) for name in FAILURES)
    return (RuntimeError, *(kind for kind in own if kind is not None))


def _check(model: Model, path: Path) -> float:
    """Largest difference of a logit from the model's, in standard deviations.

    Raises:
        RunError: it is too large, or onnxruntime does not run the graph.
    """
    import onnxruntime

    failures = _failures()
    try:
        session: Any = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except failures as error:
        raise RunError(
            f"onnxruntime does not open the graph: {first_line(error)} Nothing was kept; please "
            f"report this."
        ) from error
    function, worst = _Logits(model).eval(), 0.0
    for batch, length in ASKED:
        given = _given(model, batch, length)
        with torch.inference_mode():
            expected = function(*given.values())
        try:
            (made,) = session.run(["logits"], {k: v.numpy() for k, v in given.items()})
        except failures as error:
            raise RunError(
                f"onnxruntime does not run the graph on {batch} rows of {length}: "
                f"{first_line(error)} Nothing was kept; please report this."
            ) from error
        found = torch.from_numpy(made)
        seen = given["attention_mask"].bool() if "attention_mask" in given else ...
        if found.shape != expected.shape:
            raise RunError(
                f"the graph gives logits of shape {tuple(found.shape)} on {batch} rows of "
                f"{length}, and the model {tuple(expected.shape)}. Nothing was kept; please "
                f"report this."
            )
        spread = expected[seen].std().clamp_min(1e-12)
        difference = float((found - expected)[seen].abs().max() / spread)
        if not difference <= TOLERANCE[torch.float32]:  # which NaN is not, and max() would drop it
            raise RunError(
                f"the graph is not the model: a logit differs by {difference:.2g} of their spread. "
                f"Nothing was kept; please report this."
            )
        worst = max(worst, difference)
    return worst
