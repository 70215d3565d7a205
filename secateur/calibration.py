"""The streaming pass: calibration windows go through the model once, one block at a time."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from secateur.block import Block
from secateur.model import Model
from secateur.statistics import BlockStatistics, Need, Statistic
from secateur.text import Tokens

TOKENS_PER_BATCH = 4096


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
        try:
            with safe_open(self._path(block), framework="pt") as file:
                return file.metadata() is not None
        except (OSError, SafetensorError):  # never written, or damaged: it is measured again
            return False

    def put(self, block: int, statistics: BlockStatistics) -> None:
        """Keep a block's statistics; on disk they appear under their name only when whole."""
        if self.folder is None:
            for statistic in statistics.values():
                statistic.to("cpu")
            self._memory[block] = statistics
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            _key(n): s.total.contiguous() for n, s in statistics.items() if s.total is not None
        }
        counts = {_key(need): str(statistic.tokens) for need, statistic in statistics.items()}
        path = self._path(block)
        try:
            save_file(tensors, path.with_suffix(".partial"), metadata=counts)
        except SafetensorError as error:
            raise OSError(f"cannot write {path.name}: {error}") from error
        path.with_suffix(".partial").replace(path)

    def get(
        self, block: int, needs: Iterable[Need], device: torch.device | str = "cpu"
    ) -> BlockStatistics:
        """The statistics of a block that ``needs`` names, on a device."""
        needs = list(needs)
        if self.folder is None:
            kept = self._memory[block]
            return {
                need: need.kind(kept[need].total, kept[need].tokens).to(device) for need in needs
            }
        if not needs:
            return {}
        with safe_open(self._path(block), framework="pt", device=str(device)) as file:
            counts = file.metadata()
            return {
                need: need.kind(file.get_tensor(_key(need)), int(counts[_key(need)]))
                for need in needs
            }


def _key(need: Need) -> str:
    return f"{need.place}.{need.kind.__name__}"


@dataclass
class _Call:
    """Everything but the hidden states that the model passes to one block."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def calibrate(
    model: Model,
    tokens: Tokens,
    needs: frozenset[Need],
    store: Store,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Fill ``store`` with the statistics that ``needs`` names, from the model as it stands.

    One pass: the hidden states of all windows are kept, each block runs over them once, and a
    block's statistics leave memory before the next block's begin when the store is a folder.
    ``advance`` is told how many blocks are done.

    Raises:
        InputError: the activations hold NaN or infinite numbers.
    """
    rows = max(1, TOKENS_PER_BATCH // tokens.ids.shape[1])
    batches = [slice(i, i + rows) for i in range(0, len(tokens.ids), rows)]
    with torch.inference_mode():
        states, calls = _embed(model, tokens, batches)
        for block in model.blocks:
            statistics: dict[Need, Statistic] = {need: need.kind() for need in needs}
            for batch in batches:
                mask = tokens.mask[batch].to(model.device)
                before = states[batch].to(model.device)
                call = calls[len(before)][block.index]
                with _observed(block, statistics, mask):
                    after = _hidden(block.module(before, *call.args, **call.kwargs))
                for need, statistic in statistics.items():
                    if need.place == "block":
                        statistic.update(torch.stack((before, after), 2), mask)
                states[batch] = after.to(states.device)
            for statistic in statistics.values():
                statistic.mean  # noqa: B018 - refuses what is not finite while its block is known
            store.put(block.index, statistics)
            advance(1)


def _embed(
    model: Model, tokens: Tokens, batches: list[slice]
) -> tuple[Tensor, dict[int, list[_Call]]]:
    """Hidden states before the first block, and each block's other arguments per batch size.

    The arguments (masks, rotary tables) depend on the shape of a batch alone, as padding stands
    behind every real token and needs no mask.
    """
    states: Tensor | None = None
    calls: dict[int, list[_Call]] = {}
    for batch in batches:
        ids = tokens.ids[batch].to(model.device)
        with _blocks_bypassed(model.blocks) as seen:
            model.module.base_model(input_ids=ids, use_cache=False)
        if states is None:
            states = torch.empty(len(tokens.ids), *seen.states.shape[1:], dtype=seen.states.dtype)
        states[batch] = seen.states.cpu()
        calls[len(ids)] = seen.calls
    assert states is not None
    return states, calls


class _Seen:
    states: Tensor
    calls: list[_Call]


@contextmanager
def _blocks_bypassed(blocks: list[Block]) -> Iterator[_Seen]:
    """Let a forward pass skip all blocks, and note what each would have been called with."""
    seen = _Seen()
    seen.calls = []

    def note(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.states = hidden_states
        seen.calls.append(_Call(args, kwargs))
        return hidden_states

    try:
        for block in blocks:
            block.module.forward = note
        yield seen
    finally:
        for block in blocks:
            del block.module.forward


@contextmanager
def _observed(block: Block, statistics: dict[Need, Statistic], mask: Tensor) -> Iterator[None]:
    """Feed the statistics of one block from hooks while its forward runs."""
    attention = block.attention
    value_bias = attention.v_proj.bias

    def watch(place: str, module: nn.Module, read: Callable[[Any, Any], Tensor]) -> Any:
        wanted = [s for need, s in statistics.items() if need.place == place]

        def hook(_: nn.Module, args: Any, output: Any) -> None:
            values = read(args, output)
            for statistic in wanted:
                statistic.update(values, mask)

        return module.register_forward_hook(hook) if wanted else None

    def heads(width: int) -> Callable[[Any, Any], Tensor]:
        return lambda _, output: output.reshape(*mask.shape, -1, width)

    def unbiased(_: Any, output: Tensor) -> Tensor:
        # A value's bias reaches the output whole, as attention weights sum to one; it is folded
        # into the output's bias and is no part of what has to be rebuilt.
        values = output if value_bias is None else output - value_bias
        return values.reshape(*mask.shape, -1, attention.value)

    query, key = attention.q_norm or attention.q_proj, attention.k_norm or attention.k_proj
    with ExitStack() as stack:
        for handle in (
            watch("hidden", block.consumer, lambda args, _: args[0].reshape(*mask.shape, -1)),
            watch("query", query, heads(attention.query_key)),
            watch("key", key, heads(attention.query_key)),
            watch("value", attention.v_proj, unbiased),
        ):
            if handle is not None:
                stack.callback(handle.remove)
        yield


def _hidden(output: Any) -> Tensor:
    """A block's hidden states; some families return them in a tuple."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
