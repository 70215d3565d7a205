"""Which blocks of a run are narrowed and written, so that a run that was killed goes on there."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import FiniteFloat
from torch import Tensor, nn

from secateur.apply.renumbering import number_layers, place
from secateur.apply.save import attention_changed, block_prefix
from secateur.calibration.layer_stream import Stream
from secateur.distributed.collectives import ALONE, Ranks
from secateur.io.run_directory import AGAIN, write_whole
from secateur.io.safetensors_writer import Writer, WriterState
from secateur.io.schema import Record, read_record
from secateur.layers.attention_secateur import narrow_attention
from secateur.layers.factored_secateur import Factored
from secateur.layers.integers import Integers
from secateur.layers.modeling_secateur import factored, resized
from secateur.models.block import Block
from secateur.models.model import FAULTS_OF_CONFIG, Model
from secateur.models.offload import entries, set_entry
from secateur.structure.selection import Selection, file_name
from secateur.utils.errors import InputError, RunError, first_line, words

MAX_BYTES = 2**30


class Shape(Record):
    """What a finished block looks like.

    Attributes:
        gone: whether nothing is left of it.
        linears: sizes of the MLP's linears.
        attention: shape of an attention that is not the stock one.
        forms: specs of the layers of other forms.
    """

    gone: bool
    linears: dict[str, dict[str, int | bool]]
    attention: dict[str, Any] | None
    forms: dict[str, dict[str, Any]]


class Entries(Record):
    """The journal's file."""

    sizes: dict[str, int]
    blocks: list[Shape]
    errors: list[dict[str, FiniteFloat | None]]
    given: str | None  # digest of the selection that the plan names
    kept: str  # of the one that the finished blocks have kept
    streams: dict[str, int]  # bytes of the states of each
    streamed: bool
    writer: WriterState


class States:
    """The states of what runs through the blocks, as a process keeps its share of them.

    Attributes:
        folder: where they are, which is the same for all processes.
        done: how many blocks are finished.
    """

    def __init__(self, folder: Path, done: int, ranks: Ranks = ALONE) -> None:
        self.folder, self.ranks, self._done = folder, ranks, done
        self._streams: dict[str, Stream] = {}

    @property
    def done(self) -> int:
        """How many blocks are finished."""
        return self._done

    def path(self, name: str, done: int) -> Path:
        """Where the states of a stream are kept."""
        return self.folder / f"{name}-{done}.states"

    def attach(self, name: str, stream: Stream) -> None:
        """Keep the states of a stream, or bring it to where it was."""
        self._streams[name] = stream
        if self.done:
            stream.load(self.path(name, self.done))

    def restore(self, model: Model, block: Block) -> None:
        """Nothing behind a finished block asks for its weights."""

    def record(self, block: Block) -> None:
        """A block is finished, and all streams are behind it."""
        if journalled(block) and block.index == self._done:
            self._done += 1
            self.save()

    def save(self) -> None:
        """Write the states; those of all processes are whole when this returns."""
        for name, stream in self._streams.items():
            stream.save(self.path(name, self.done))
        self.ranks.barrier()


class Journal(States):
    """The blocks that are done, the states of what runs through them, and what is written.

    ``kept`` are the coordinates that units keep: those of the plan's selection, and those that
    finished blocks have chosen.

    After each block the states of all attached streams are written beside the journal, then the
    journal, then the states before are dropped. So there is always one whole state to go on from.
    Weights are those that the ``writer`` has on disk already.

    Don't use it where layers are packed integers or the stream is sliced: such runs start their
    narrowing again.
    """

    def __init__(
        self,
        folder: Path,
        writer: Writer,
        sizes: Mapping[str, int],
        streamed: bool = False,
        ranks: Ranks = ALONE,
        selection: Selection | None = None,
    ) -> None:
        super().__init__(folder, 0, ranks)
        self._writer, self._streamed = writer, streamed
        self._sizes, self._given = dict(sizes), None if selection is None else selection.digest
        self.kept: dict[str, Tensor] = {} if selection is None else dict(selection.kept)
        self._path = folder / "journal.json"
        self._blocks: list[Shape] = []
        self.errors: list[dict[str, float | None]] = []
        found = self._read()
        if found is None:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(writer.folder, ignore_errors=True)
            writer.folder.mkdir(parents=True)
            folder.mkdir()
        else:
            self._blocks, self.errors = found.blocks, found.errors
            self.kept = dict(Selection.load(folder, found.kept).kept)

    @property
    def done(self) -> int:
        """How many blocks are finished."""
        return len(self._blocks)

    def _read(self) -> Entries | None:
        """What an earlier run has left, if it can be gone on with."""
        if not self._path.exists():
            return None
        try:
            found = read_record(Entries, self._path, "journal", MAX_BYTES)
        except InputError:  # damaged, or of another version: the narrowing starts again
            return None
        if found.given != self._given or found.sizes != self._sizes:
            return None
        if found.streamed != self._streamed:
            return None  # of a model that was read in the other way, other states are kept
        for name, size in found.streams.items():
            path = self.path(name, len(found.blocks))
            if not path.exists() or path.stat().st_size != size:
                return None
        try:
            Selection.load(self.folder, found.kept)
        except InputError:
            return None
        return found if self._writer.go_on(found.writer) else None

    def record(self, block: Block) -> None:
        """A block is finished and written, and all streams are behind it."""
        if not journalled(block) or block.index != self.done:
            return  # what is behind a block that is not noted can't be gone on from
        before = self.done
        self._blocks.append(shape_of(block))
        self.save()
        kept = Selection(self.kept)
        kept.save(self.folder)
        content = Entries(
            sizes=self._sizes,
            blocks=self._blocks,
            errors=self.errors,
            given=self._given,
            kept=kept.digest,
            streams={n: self.path(n, self.done).stat().st_size for n in self._streams},
            streamed=self._streamed,
            writer=self._writer.state(),
        )
        write_whole(self._path, content.model_dump_json())
        self._writer.settle()
        for name in self._streams:
            self.path(name, before).unlink(missing_ok=True)
        for path in self.folder.glob(file_name("*")):
            if path.name != file_name(kept.digest):
                path.unlink()

    def restore(self, model: Model, block: Block) -> None:
        """Give a block the shape that it was finished in and, in a whole model, its weights."""
        try:
            self._restore(model, block, self._blocks[block.index])
        except (*FAULTS_OF_CONFIG, StopIteration) as error:
            if isinstance(error, RunError) or "memory" in str(error):
                raise  # what was written can't be read, or is too large for now
            self._path.unlink()
            raise InputError(
                f"journal {str(self._path)!r}: what it says of block {block.index} can't be "
                f"({words(first_line(error))}).{AGAIN}"
            ) from error

    def _restore(self, model: Model, block: Block, shape: Shape) -> None:
        if shape.gone:
            block.remove()
            return
        with torch.device("meta"):
            for path, size in shape.linears.items():
                old = block.module.get_submodule(path)
                new = resized(old, int(size["out"]), int(size["in"]), bool(size["bias"]))
                block.module.set_submodule(path, new)
            if shape.attention is not None:
                mixer = block.attention
                mixer.replace(narrow_attention(mixer.stock, dict(shape.attention)))
            made = {path: factored(block.module, path, s) for path, s in shape.forms.items()}
            for path, form in made.items():
                form.follow(made)
                block.module.set_submodule(path, form)
        number_layers(block, place(model, block))
        if model.offload is not None:
            model.offload.leave(block)
            return
        self._fill(model, block, shape.attention is not None)

    def _fill(self, model: Model, block: Block, changed: bool) -> None:
        prefix, same = block_prefix(model, block), [] if changed else block.mixers
        inside = tuple(f"{mixer.path}." for mixer in same)
        parts: list[tuple[nn.Module, str, tuple[str, ...]]] = [(block.module, prefix, inside)]
        parts += [(mixer.stock, f"{prefix}{mixer.path}.", ()) for mixer in same]
        for root, before, left_out in parts:
            for name, old in list(entries(root)):
                if name.startswith(left_out):
                    continue
                tensor = self._writer.read(before + name, old)
                dtype = model.module.dtype if tensor.is_floating_point() else tensor.dtype
                path, _, own = name.rpartition(".")
                set_entry(root.get_submodule(path), own, tensor.to(model.device, dtype))
        for mixer in same:
            mixer.restore()
        block.module.eval()


def journalled(block: Block) -> bool:
    """Whether a block can be given back from its shape and its written weights."""
    packed = any(isinstance(module, Integers) for module in block.module.modules())
    configs = [getattr(mixer.stock, "config", None) for mixer in block.mixers]
    scaled = any(getattr(c, "scale_attn_by_inverse_layer_idx", False) for c in configs)
    return not packed and not scaled


def shape_of(block: Block) -> Shape:
    """What :meth:`Journal.restore` makes a block of."""
    if block.gone:
        return Shape(gone=True, linears={}, attention=None, forms={})
    forms = {p: dict(m.spec) for p, m in block.module.named_modules() if isinstance(m, Factored)}
    changed = [mixer.module.shape for mixer in block.mixers if attention_changed(mixer)]
    attention = json.loads(json.dumps(changed[0])) if changed else None
    return Shape(gone=False, linears=block.linears, attention=attention, forms=forms)
