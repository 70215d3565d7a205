"""How the loss changes with a mask over channels and KV heads: its gradient in every window."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from secateur.calibration.needs import Need, in_block
from secateur.calibration.statistics import Energy, wide
from secateur.data.tokens import Tokens
from secateur.distributed.collectives import ALONE, Ranks
from secateur.models.block import Block
from secateur.models.model import Model
from secateur.models.parts import AxisView
from secateur.structure.sites import Site
from secateur.utils.errors import InputError
from secateur.utils.precision import exact

MASK = "mask"  #: sides of sites of these gradients are "mask:KIND"
#: kind of unit → mean over windows of the squared gradient by each number of a mask of ones
FISHER = {
    kind: Need(Site(part, f"{MASK}:{kind}"), Energy)
    for kind, part in (("mlp", "mlp"), ("heads", "attention"))
}
Gradients = Mapping[tuple[int, Site], Tensor]


def is_of_masks(need: Need) -> bool:
    """Whether a statistic is of gradients by masks."""
    return need.site.side.partition(":")[0] == MASK


@torch.inference_mode(False)
def mask_gradients(
    model: Model, tokens: Tokens, needs: Iterable[Need], ranks: Ranks = ALONE
) -> Gradients:
    """Block index and site → ∂L/∂m in every window, (windows, size), float64.

    m are numbers, all 1, by which the channels of an MLP, or the outputs of all query heads of a KV
    head, are multiplied before they are read; L is a window's mean loss. One forward and backward
    pass a window; no parameter gets a gradient. On several ``ranks`` each takes its share of the
    windows, and all have all rows.

    Raises:
        InputError: no window has a token that is predicted.
    """
    sites = [
        (block, need.site)
        for block in model.blocks
        for need in in_block(needs, block)
        if is_of_masks(need)
    ]
    if not sites:
        return {}
    share = ranks.share(len(tokens), 1)
    rows: dict[tuple[int, Site], list[Tensor]] = {(b.index, site): [] for b, site in sites}
    required = [(p, p.requires_grad) for p in model.module.parameters()]
    try:
        for parameter, _ in required:
            parameter.requires_grad_(False)
        for start in range(len(tokens))[share]:
            window = _window_gradients(model, tokens[start : start + 1].to(model.device), sites)
            for key, gradient in window.items():
                rows[key].append(gradient)
    finally:
        for parameter, before in required:
            parameter.requires_grad_(before)
    found = {}
    for (block, site), own in zip(sites, rows.values(), strict=True):
        size = view_of(block, site).read().shape[0]
        mine = torch.stack(own) if own else torch.zeros(0, size, dtype=torch.float64)
        found[block.index, site] = torch.cat([part.cpu() for part in ranks.all_gather(mine)])
    if not len(next(iter(found.values()))):
        raise InputError(f"calibration: {model.use.lacking}")
    return found


def view_of(block: Block, site: Site) -> AxisView:
    """The units that a site of mask gradients ("mask:KIND" of a part) is of."""
    return block.part(site.path).axis(site.side.partition(":")[2])


def _window_gradients(
    model: Model, window: Tokens, sites: Iterable[tuple[Block, Site]]
) -> dict[tuple[int, Site], Tensor]:
    """The gradients in one window; none where it predicts nothing."""
    masks = {}
    with torch.enable_grad(), ExitStack() as stack:
        for block, site in sites:
            view = view_of(block, site)
            size, width, _ = view.read().shape
            dtype = torch.promote_types(model.module.dtype, torch.float32)
            mask = torch.ones(size, dtype=dtype, device=model.device, requires_grad=True)
            handle = view.reader.register_forward_pre_hook(_multiplied(mask, width))
            stack.callback(handle.remove)
            masks[block.index, site] = mask
        logits = model.module(**model.use.inputs(window)).logits
        loss, count = model.use.loss(wide(logits), window)
        if count == 0:
            return {}
        gradients = torch.autograd.grad(loss / count, [*masks.values()])
    return dict(zip(masks, map(exact, gradients), strict=True))


def _multiplied(mask: Tensor, width: int) -> Callable[[nn.Module, Any], Any]:
    """A hook that multiplies what a module reads by a mask, each number of it for ``width``."""

    def hook(_: nn.Module, args: Any) -> Any:
        states = args[0]
        return (states * mask.repeat_interleave(width).to(states.dtype), *args[1:])

    return hook
