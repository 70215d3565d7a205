"""What a number that is made of the logits loses with each channel and each KV head: gradients.

A statistic whose side is "FUNCTIONAL:KIND" is of the gradient of a functional with respect to all
parameters that go with a channel ("mlp") or a KV head ("heads"). It takes a backward pass of the
whole model, so it is collected before the statistics of the blocks, not with them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from secateur.calibration.needs import Need, in_block
from secateur.calibration.statistics import Statistic, wide
from secateur.data.tasks import Use
from secateur.data.tokens import Tokens
from secateur.distributed.collectives import ALONE, Ranks
from secateur.models.block import Block
from secateur.models.model import Model
from secateur.models.parts import AxisView
from secateur.structure.sites import Site
from secateur.structure.units import READS
from secateur.utils.errors import InputError
from secateur.utils.precision import exact

TOKENS_PER_BACKWARD = 1024  # what a backward pass needs is kept for all blocks at once


class FirstOrder(Statistic):
    """What scaling a channel or a KV head down does to a functional, to first order: (2, size).

    Σ |g∘w| and Σ g∘w over the parameters w of each, g the gradient summed over all tokens. The
    absolute value is that of the whole sum, so it is fed once, and parts of it do not add up.
    """

    id: ClassVar[str] = "FirstOrder"

    what = "gradients"

    @classmethod
    def shape(cls, *features: int) -> tuple[int, ...]:
        return 2, *features

    @classmethod
    def squares(cls, total: Tensor) -> Tensor:
        return total[0]

    def summed(self, *values: Tensor, mask: Tensor) -> Tensor:
        weights, gradient = map(exact, values[:2])
        products = weights * gradient
        return torch.stack((products.abs().sum(1), products.sum(1)))


class SecondOrder(FirstOrder):
    """The same with a diagonal Fisher matrix for the curvature: (4, size).

    Below Σ |g∘w| and Σ g∘w stand Σ ½ w² F and Σ |g∘w − ½ w² F| with F = E g², the mean over windows
    of the squared gradient of a window's mean. What removing a parameter does is −g w + ½ w² F.
    """

    id: ClassVar[str] = "SecondOrder"

    @classmethod
    def shape(cls, *features: int) -> tuple[int, ...]:
        return 4, *features

    @classmethod
    def squares(cls, total: Tensor) -> Tensor:
        return total[[0, 2, 3]]

    def summed(self, *values: Tensor, mask: Tensor) -> Tensor:
        weights, gradient, squares = map(exact, values)
        curved = 0.5 * weights.square() * squares * int(mask.sum())
        both = torch.stack((curved.sum(1), (weights * gradient - curved).abs().sum(1)))
        return torch.cat((super().summed(weights, gradient, mask=mask), both))


PARTS = {kind: site.path for kind, site in READS.items()}  #: kind of unit → its part
#: kind of unit → first-order statistic of the mean loss
LOSS = {kind: Need(Site(part, f"loss:{kind}"), FirstOrder) for kind, part in PARTS.items()}
#: the same with second order
CURVED_LOSS = {kind: Need(Site(part, f"loss:{kind}"), SecondOrder) for kind, part in PARTS.items()}
#: kind of unit → first-order statistic of the mean over the vocabulary of a window's highest logits
LOGITS = {kind: Need(Site(part, f"logits:{kind}"), FirstOrder) for kind, part in PARTS.items()}


def own_loss(use: Use, logits: Tensor, tokens: Tokens) -> tuple[Tensor, int]:
    """The loss that the model was trained on, summed over all that it says, and their number."""
    return use.loss(logits, tokens)


def highest_logits(use: Use, logits: Tensor, tokens: Tokens) -> tuple[Tensor, int]:
    """The highest logit of every class over the positions of each window that count.

    Their sum and their number, which is windows × vocabulary.
    """
    counted = use.counted(tokens).unsqueeze(-1)
    rows = logits.masked_fill(~counted, -torch.inf).view(len(logits), -1, logits.shape[-1])
    highest = rows.max(1).values
    return highest.sum(), highest.numel()


Functional = Callable[[Use, Tensor, Tokens], tuple[Tensor, int]]
FUNCTIONALS: dict[str, Functional] = {"loss": own_loss, "logits": highest_logits}


def needs_gradients(need: Need) -> bool:
    """Whether a statistic is of gradients, and so not of one block's activations."""
    return need.site.side.partition(":")[0] in FUNCTIONALS


@torch.inference_mode(False)
def collect_gradients(
    model: Model, tokens: Tokens, needs: Iterable[Need], ranks: Ranks = ALONE
) -> dict[int, dict[Need, Statistic]]:
    """Block index → all statistics of gradients among ``needs``; the model stays as it was.

    One forward and backward pass for each functional, in batches of :data:`TOKENS_PER_BACKWARD`,
    or window by window where squared gradients are asked for. Memory, beside the model: one copy of
    the block weights in float32 (two with squares) and the activations of a batch in all blocks.
    On several ``ranks`` each takes its share of the windows.

    Raises:
        InputError: a gradient is not finite, or no token has one before it.
    """
    found: dict[int, dict[Need, Statistic]] = {block.index: {} for block in model.blocks}
    groups: dict[str, list[Need]] = {}
    for need in sorted(filter(needs_gradients, needs), key=lambda n: n.id):
        groups.setdefault(need.site.side.partition(":")[0], []).append(need)
    for name, own in groups.items():
        sums = _Sums(any(issubclass(need.kind, SecondOrder) for need in own))
        for block in model.blocks:
            for site in sorted({need.site for need in in_block(own, block)}):
                _view(block, site).parameters(of=sums.follow)
        share = ranks.share(len(tokens), max(1, TOKENS_PER_BACKWARD // tokens.length))
        _backward(model, tokens[share], FUNCTIONALS[name], sums)
        sums.add_up(ranks)
        if sums.count == 0:
            raise InputError(f"calibration: {model.use.lacking}")
        counted = torch.ones(sums.count, dtype=torch.bool)
        for block in model.blocks:
            for need in in_block(own, block):
                ways = [lambda parameter: parameter, sums.first.__getitem__]
                if issubclass(need.kind, SecondOrder):
                    ways.append(sums.mean_square)
                statistic, view = need.kind(), _view(block, need.site)
                with torch.no_grad():
                    values = [_rows(view.parameters(of=way)) for way in ways]
                    statistic.update(*values, mask=counted)
                found[block.index][need] = statistic
    return found


@dataclass
class _Sums:
    """Gradients of some parameters, summed over batches in float32 or more.

    Attributes:
        squared: whether the squares of each window's mean gradient are summed too.
        count: terms of the functional so far.
        windows: windows so far, where squares are summed.
    """

    squared: bool
    first: dict[Tensor, Tensor] = field(default_factory=dict)
    second: dict[Tensor, Tensor] = field(default_factory=dict)
    count: int = 0
    windows: int = 0
    terms: int = 0

    def follow(self, parameter: Tensor) -> Tensor:
        """Sum the gradients of a parameter, too."""
        kinds = (self.first, self.second) if self.squared else (self.first,)
        for sums in kinds:
            sums[parameter] = torch.zeros_like(wide(parameter.detach()))
        return parameter

    def add(self, parameter: Tensor) -> None:
        """Take over the gradient of a batch, which has :attr:`terms` terms."""
        assert parameter.grad is not None
        gradient = wide(parameter.grad)
        self.first[parameter] += gradient
        if self.squared:
            self.second[parameter] += (gradient / self.terms).square_()
        parameter.grad = None

    def add_up(self, ranks: Ranks) -> None:
        """Let them be those of all processes."""
        counts = torch.tensor([self.count, self.windows])
        ranks.all_reduce([counts, *self.first.values(), *self.second.values()])
        self.count, self.windows = map(int, counts)

    def mean_square(self, parameter: Tensor) -> Tensor:
        """E g² over windows."""
        return self.second[parameter] / self.windows


def _view(block: Block, site: Site) -> AxisView:
    """The units whose gradients a site ("FUNCTIONAL:KIND" of a part) is of."""
    return block.part(site.path).axis(site.side.partition(":")[2])


def _rows(parts: Sequence[Tensor]) -> Tensor:
    """The parameters of every channel or KV head side by side: (size, parameters)."""
    return torch.cat([part.reshape(len(part), -1) for part in parts], 1)


def _backward(model: Model, tokens: Tokens, functional: Functional, sums: _Sums) -> None:
    rows = 1 if sums.squared else max(1, TOKENS_PER_BACKWARD // tokens.length)
    with _differentiable(model.module, sums):
        for start in range(0, len(tokens), rows):
            given = tokens[start : start + rows].to(model.device)
            logits = model.module(**model.use.inputs(given)).logits
            value, sums.terms = functional(model.use, wide(logits), given)
            if sums.terms:
                value.backward()
                sums.count, sums.windows = sums.count + sums.terms, sums.windows + len(given)


@contextmanager
def _differentiable(module: nn.Module, sums: _Sums) -> Iterator[None]:
    """Gradients for what ``sums`` follows and for nothing else; then everything as it was."""
    before = [(p, p.requires_grad, p.grad) for p in module.parameters()]
    with torch.enable_grad(), ExitStack() as stack:
        try:
            for parameter, _, _ in before:
                parameter.grad = None
                parameter.requires_grad_(parameter in sums.first)
            for followed in sums.first:
                handle = followed.register_post_accumulate_grad_hook(sums.add)
                stack.callback(handle.remove)
            yield
        finally:
            for parameter, required, gradient in before:
                parameter.requires_grad_(required)
                parameter.grad = gradient
