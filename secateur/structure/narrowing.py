"""What replaces a unit at a smaller size, in tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Narrowing:
    """What replaces an axis z of width n by one of width k: z W becomes (z E) Ŵ.

    Attributes:
        keep: the kept coordinates, in order: (k) for an MLP or for KV heads, (kv heads, k) for
            query/key. None where E is a dense basis.
        encode: E, (kv heads, n, k), multiplied into the values, or into the queries of the heads
            that read a KV head, whose keys are selected; (n, k), orthonormal, for the residual
            stream, from which E also tells what reads and writes it. None where E selects.
        consumer: Ŵ in place of the consumer's rows: (k, outputs) for an MLP, (heads · k, outputs)
            for value/output. None leaves the kept rows as they are.
        bias: a constant for the consumer's output in place of what is gone, (outputs).
        layers: by their paths, layers in place of linear ones, for a unit that is a matrix.

    Value/output without ``encode`` keeps its width, and only the consumer changes.
    """

    keep: Tensor | None = None
    encode: Tensor | None = None
    consumer: Tensor | None = None
    bias: Tensor | None = None
    layers: Mapping[str, nn.Module] = field(default_factory=dict)

    def to(self, device: torch.device) -> "Narrowing":
        """The same with its indices and layers on a device; what is multiplied goes there later."""
        return replace(
            self,
            keep=None if self.keep is None else self.keep.to(device),
            layers={path: layer.to(device) for path, layer in self.layers.items()},
        )
