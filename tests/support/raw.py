"""Raw activations, and what least squares makes of them without any Gram."""

from types import SimpleNamespace

import torch

from secateur.calibration.needs import Needs
from secateur.calibration.statistics import Gram


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def activations(seed, tokens, size):
    """Correlated coordinates of unequal energy."""
    mixed = normal(seed, tokens, size)
    mixed = mixed + 0.7 * mixed.roll(1, 1)
    return mixed * (0.2 + normal(seed + 100, size).abs())


def gram_of(x):
    return x.t() @ x / len(x)


def spelled(which, width):
    """The coordinates of some blocks of neighbours."""
    return [i * width + j for i in which for j in range(width)]


def direct_error(x, t, keep):
    """E(S) by least squares on the raw tokens."""
    keep = torch.as_tensor(keep, dtype=torch.int64)
    fitted = x[:, keep] @ torch.linalg.lstsq(x[:, keep], t, driver="gelsd").solution
    return float((t - fitted).square().sum() / len(x))


def solved(method, x, w, width=1):
    """A method's answer for activations (tokens, coordinates) and a consumer of channels or heads.

    Channels where ``width`` is 1, KV heads of as many coordinates elsewhere; no biases.
    """
    kind = "mlp" if width == 1 else "heads"
    need = Needs.HIDDEN_GRAM if width == 1 else Needs.MIXED_GRAM
    statistics = {need: Gram()}
    statistics[need].update(x[None], mask=torch.ones(1, len(x), dtype=torch.bool))
    unit = SimpleNamespace(name=kind, kind=kind, size=len(w) // width)
    axis = SimpleNamespace(read=lambda: w.unflatten(0, (-1, width)), constant=None)
    block = SimpleNamespace(axis=lambda _: axis)
    return method.solve(unit, block, statistics)


def lost(x, w, narrowing, width=1):
    """The mean squared error of a narrowing on the raw tokens."""
    at = spelled(narrowing.keep.tolist(), width)
    rows = w[at] if narrowing.consumer is None else narrowing.consumer
    return float((x @ w - x[:, at] @ rows).square().sum() / len(x))
