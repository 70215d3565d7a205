"""The calibration pass: windows go through the model once, and leave statistics behind."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from secateur.calibration.gradients import collect_gradients, needs_gradients
from secateur.calibration.hooks import observed
from secateur.calibration.layer_stream import Stream
from secateur.calibration.needs import BlockStatistics, Need, Needs, in_block, in_parts
from secateur.calibration.statistics import Statistic
from secateur.calibration.summation import add_up
from secateur.data.tokens import Tokens
from secateur.distributed.collectives import ALONE, Ranks
from secateur.io.atomic import own_partial, remove_partials
from secateur.io.run_directory import write_whole
from secateur.io.safe_parse import parse_json, read_bytes
from secateur.io.safetensors_header import Entry, read_whole
from secateur.io.safetensors_reader import read_tensor
from secateur.io.schema import reading
from secateur.models.block import Block
from secateur.models.model import Model
from secateur.utils.errors import InputError, refuse_difference, shown

MAX_BYTES = 2**20


class Store:
    """The statistics of every block, in memory or as one safetensors file a block in a folder.

    Give a folder for any but a small model: a Gram of a 7B model's MLP takes a gigabyte a block.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._memory: dict[int, BlockStatistics] = {}

    def _path(self, block: int) -> Path:
        assert self.folder is not None
        return self.folder / f"block-{block:05d}.safetensors"

    def __contains__(self, block: int) -> bool:
        if self.folder is None:
            return block in self._memory
        return bool(self._read(block)[1])

    def _read(self, block: int) -> tuple[dict[str, Entry], dict[str, str]]:
        """The header of a block's file; nothing where it was never written, or is damaged."""
        try:
            return read_whole(self._path(block))
        except InputError:
            return {}, {}

    def claim(
        self, own: dict[str, Any], needs: Iterable[Need], blocks: Iterable[Block] = ()
    ) -> None:
        """Note in the folder what its statistics are of, or hold it against what is noted there.

        Whatever the folder has of ``blocks`` is held against their shapes; no number is read.

        Raises:
            InputError: they are of something else; the message names the field that differs.
        """
        if self.folder is None:
            return
        needs = frozenset(needs)
        own = own | {"needs": sorted(need.id for need in needs)}
        path = self.folder / "identity.json"
        advice = "Name another folder, or remove this one."
        with reading(path, "statistics", f" {advice}"):
            found = parse_json(read_bytes(path, MAX_BYTES, path.name)) if path.exists() else own
        if not isinstance(found, dict) or (found is own and any(self.folder.glob("block-*"))):
            raise InputError(
                f"statistics {str(self.folder)!r}: nothing says what they are of. {advice}"
            )
        refuse_difference(f"statistics {str(self.folder)!r}", found, own, advice)
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_partials(self.folder, "block-*")
        for block in blocks:
            self._check(block, needs | {Needs.INFLUENCE})
        write_whole(path, json.dumps(own, indent=1))

    def _check(self, block: Block, needs: Iterable[Need]) -> None:
        """Refuse a file of other sums than a block's, or of other shapes.

        Raises:
            InputError: it is one, or no file.
        """
        path = self._path(block.index)
        named = f"statistics {str(path)!r}"
        if path.exists() and not path.is_file():
            raise InputError(f"{named}: it is no file. Remove it.")
        there, counts = self._read(block.index)
        if not counts:  # it is measured
            return
        needs = in_block(needs, block)
        if differing := sorted({need.id for need in needs} ^ counts.keys()):
            fault = "is too much" if differing[0] in counts else "is missing"
            raise InputError(f"{named}: {shown(differing[0])} {fault}. Remove the file.")
        for need in needs:
            shape = need.kind.shape(*block.features(need.site))
            whole = need.kind(torch.empty(shape, dtype=torch.float64, device="meta"))
            for name, part in whole.parts().items():
                entry = there.get(need.id + name)
                if entry is None or entry.dtype != "F64" or entry.shape != tuple(part.shape):
                    seen = "missing" if entry is None else f"{entry.shape} of {entry.dtype}"
                    raise InputError(
                        f"{named}: {need.id}{name} is {seen}, and of this model it is "
                        f"{tuple(part.shape)} of F64. Remove the file."
                    )

    def put(self, block: int, statistics: BlockStatistics) -> None:
        """Keep a block's statistics; on disk they appear under their name only when whole."""
        if self.folder is None:
            for statistic in statistics.values():
                statistic.to("cpu")
            self._memory[block] = statistics
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            need.id + name: part.contiguous()
            for need, statistic in statistics.items()
            for name, part in statistic.parts().items()
        }
        counts = {need.id: str(statistic.tokens) for need, statistic in statistics.items()}
        path = self._path(block)
        partial = own_partial(path)
        partial.unlink(missing_ok=True)  # a link of that name would lead elsewhere
        try:
            save_file(tensors, partial, metadata=counts)
        except SafetensorError as error:
            partial.unlink(missing_ok=True)
            raise OSError(f"cannot write {path.name}: {error}") from error
        partial.replace(path)

    def get(
        self, block: int, needs: Iterable[Need], device: torch.device | str = "cpu"
    ) -> BlockStatistics:
        """The statistics of a block that ``needs`` names, as far as it has them, on a device."""
        needs = in_parts(needs)
        if self.folder is None:
            kept = self._memory[block]
            return {
                need: need.kind(kept[need].total, kept[need].tokens).to(device)
                for need in needs
                if need in kept
            }
        if not needs:
            return {}
        path = self._path(block)
        there, counts = read_whole(path)
        found: dict[Need, Statistic] = {}
        for need in needs:
            if (key := need.id) not in counts:
                continue
            seen = counts[key]
            if not (seen.isascii() and seen.isdigit() and len(seen) < 19):
                raise InputError(f"statistics {str(path)!r}: {key} is of {shown(seen)} tokens.")

            def part(name: str, key: str = key) -> Tensor:
                entry = there.get(key + name)
                if entry is None or entry.dtype != "F64":
                    raise InputError(f"statistics {str(path)!r}: {key} is missing or no sum.")
                read = read_tensor(path, entry).to(device)  # not mapped: see TensorReader
                if not bool(torch.isfinite(read).all()):
                    raise InputError(f"statistics {str(path)!r}: {key} holds NaN or infinity.")
                return read

            statistic = need.kind.of_parts(part, int(seen))
            assert statistic.total is not None
            if bool((need.kind.squares(statistic.total) < 0).any()):
                raise InputError(f"statistics {str(path)!r}: {key} has sums of squares below 0.")
            found[need] = statistic
        return found


def calibrate(
    model: Model,
    tokens: Tokens,
    needs: frozenset[Need],
    store: Store,
    advance: Callable[[int], None] = lambda _: None,
    ranks: Ranks = ALONE,
) -> None:
    """Fill ``store`` with the statistics that ``needs`` names, and the influence of every block.

    Blocks that it has already are only gone through.

    One pass: the hidden states of all windows are kept, each block runs over them once, and a
    block's statistics leave memory before the next block's begin when the store is a folder.
    ``advance`` is told how many blocks are done. Statistics of gradients take a backward pass of
    the whole model first; ``collect_gradients`` says what memory that takes. On several ``ranks``
    each takes its share of the windows, and the first has the store.

    Raises:
        InputError: the activations or gradients hold NaN or infinite numbers.
    """
    gradients = collect_gradients(model, tokens, needs, ranks)
    for statistics in gradients.values():
        check_finite(statistics)
    missing = ranks.broadcast(lambda: [b.index for b in model.blocks if b.index not in store])
    with torch.inference_mode():
        stream = Stream(model, tokens, ranks=ranks)
        for block in model.in_turn(model.blocks[: max(missing, default=-1) + 1]):
            if block.index in missing:
                found = collect(stream, block, needs | {Needs.INFLUENCE})
                if ranks.leader:
                    store.put(block.index, {**found, **gradients[block.index]})
                found = {}  # gone before those of the next are summed
            else:  # an interrupted run has them
                stream.advance(block)
            advance(1)


def collect(
    stream: Stream, block: Block, needs: Iterable[Need], move: bool = True
) -> BlockStatistics:
    """The statistics of one block on a stream that stands before it, and then, to ``move``, behind.

    Those of gradients are left out: no stream gives them.

    Raises:
        InputError: the activations hold NaN or infinite numbers.
    """
    statistics: dict[Need, Statistic] = {
        need: need.kind() for need in in_block(needs, block) if not needs_gradients(need)
    }
    part, ahead = stream.part(block), stream.ahead(block)
    for statistic in statistics.values():
        statistic.ahead = ahead
    for batch in stream.batches:
        mask, before = stream.mask(batch, block), stream.at(batch)
        with observed(block, statistics, mask):
            after = stream.through(block, before)
        for need, statistic in statistics.items():
            if need.site == Needs.INFLUENCE.site:
                statistic.update(before[:, part], after[:, part], mask=mask)
            if need.site == Needs.BEHIND_GRAM.site:
                statistic.update(after[:, part], mask=mask)
        if move:
            stream.put(batch, after)
    add_up(statistics, stream.ranks)
    check_finite(statistics)
    return statistics


def check_finite(statistics: BlockStatistics) -> None:
    """Refuse what is not finite while its block is known.

    Raises:
        InputError: a sum is not finite, or no token was seen.
    """
    for statistic in statistics.values():
        statistic.checked()
