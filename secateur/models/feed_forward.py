"""MLPs: dense feed-forward parts of a block, and the channels inside them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur.families import FeedForward
from secateur.models.linear_ops import (
    dense_weight,
    inputs_by_outputs,
    may_be_empty,
    set_linear,
    sizes_of,
    with_constant,
)
from secateur.models.parts import AxisView, Give, Handle, LinearPath, Part, entering
from secateur.structure.narrowing import Narrowing
from secateur.structure.units import MLP
from secateur.utils.precision import exact

if TYPE_CHECKING:
    from secateur.models.block import Block


class DenseMLP(Part):
    """An MLP: producers make hidden channels, an activation bends them, a consumer reads them."""

    role = "mlp"

    def __init__(self, block: "Block", number: int, paths: FeedForward) -> None:
        super().__init__(block, number)
        self.paths = paths
        for path in (*(path for path, _ in paths.producers), paths.consumer):
            block.module.set_submodule(path, may_be_empty(block.module.get_submodule(path)))
        self.views = {Channels.kind: Channels(self)}

    @property
    def producers(self) -> list[tuple[nn.Module, int]]:
        """The linears that make the hidden channels, with their number of equal parts."""
        module = self.block.module
        return [(module.get_submodule(path), parts) for path, parts in self.paths.producers]

    @property
    def producer_weights(self) -> list[Tensor]:
        """The producers' weights part by part, the gate first: views of (inputs, channels)."""
        return [
            part
            for producer, parts in self.producers
            for part in inputs_by_outputs(producer).chunk(parts, 1)
        ]

    def produced(self, inputs: Tensor) -> list[Tensor]:
        """What the producers make of (tokens, inputs), part by part: (tokens, channels)."""
        return [
            part for module, parts in self.producers for part in module(inputs).chunk(parts, -1)
        ]

    def channels(self, produced: list[Tensor]) -> Tensor:
        """The hidden channels from what the producers made, channel by channel."""
        activation = self.block.module.get_submodule(self.paths.activation)
        hidden: Tensor = activation(produced[0])
        return hidden * produced[1] if len(produced) == 2 else hidden

    @property
    def matrices(self) -> list[Tensor]:
        producers = [part for m, n in self.producers for part in dense_weight(m).chunk(n)]
        return [*producers, dense_weight(self.consumer)]

    @property
    def consumer(self) -> nn.Module:
        """The linear that reads the hidden channels."""
        return self.block.module.get_submodule(self.paths.consumer)

    @property
    def consumer_weight(self) -> Tensor:
        """The consumer's weight as (hidden channels, outputs), float64."""
        return exact(inputs_by_outputs(self.consumer))

    @property
    def width(self) -> int:
        """How many hidden channels there are."""
        return int(inputs_by_outputs(self.consumer).shape[0])

    def set_consumer_weight(self, rows: Tensor, bias: Tensor | None = None) -> None:
        """Give the consumer another weight, (channels, outputs), and add to its bias."""
        consumer: Any = self.consumer
        like = inputs_by_outputs(consumer)
        rows = rows.t().to(like).contiguous()
        set_linear(consumer, rows, with_constant(consumer.bias, bias, like))

    @property
    def outputs(self) -> int:
        return int(sizes_of(self.consumer)["out"])

    @property
    def device(self) -> torch.device:
        return next(self.consumer.parameters()).device

    @property
    def linear_paths(self) -> list[LinearPath]:
        producers = [LinearPath(path, "mlp_inputs", n, True) for path, n in self.paths.producers]
        return [*producers, LinearPath(self.paths.consumer, "hidden", 1, True)]

    def features(self, side: str) -> tuple[int, ...] | None:
        if side == "mlp_inputs":
            return (int(sizes_of(self.producers[0][0])["in"]),)
        return (self.width,)

    def watch(
        self, side: str, give: Give, shape: Sequence[int], wanted: Callable[[], bool]
    ) -> Handle:
        module = {"mlp_inputs": self.producers[0][0], "hidden": self.consumer}[side]
        return module.register_forward_pre_hook(entering(give, shape))

    @contextmanager
    def kept(self) -> Iterator[None]:
        linears = [*(producer for producer, _ in self.producers), self.consumer]
        before = [(module, inputs_by_outputs(module).t(), module.bias) for module in linears]
        try:
            yield
        finally:
            for module, weight, bias in before:
                set_linear(module, weight, bias if isinstance(bias, Tensor) else None)


class Channels(AxisView):
    """The hidden channels of an MLP."""

    kind = "mlp"
    part: DenseMLP

    def unit(self, multiple_of: int, biased: bool) -> MLP:
        mlp, producers = self.part, self.part.producers
        return MLP(
            name=f"layers.{mlp.block.index}.{mlp.name}",
            block=mlp.block.index,
            size=mlp.width,
            step=multiple_of,
            hidden=mlp.block.hidden,
            producers=sum(parts for _, parts in producers),
            biased_producers=sum(parts for m, parts in producers if m.bias is not None),
            new_bias=biased and mlp.consumer.bias is None,
            part=mlp.name,
            matrices=mlp.span(0, sum(path.matrices for path in mlp.linear_paths)),
        )

    def narrow(self, narrowing: Narrowing) -> None:
        """Select the producers' channels and refit the consumer."""
        mlp, keep = self.part, narrowing.keep
        assert keep is not None
        for producer, parts in mlp.producers:
            weight = inputs_by_outputs(producer)  # inputs, parts * channels
            channels = weight.shape[1] // parts
            rows = torch.cat([keep + part * channels for part in range(parts)])
            bias = producer.bias
            kept_bias = bias[rows] if isinstance(bias, Tensor) else None
            set_linear(producer, weight[:, rows].t().contiguous(), kept_bias)
        kept = narrowing.consumer
        if kept is None:
            kept = inputs_by_outputs(mlp.consumer)[keep]
        mlp.set_consumer_weight(kept, narrowing.bias)

    def arbitrary(self, size: int) -> Narrowing:
        return Narrowing(keep=torch.arange(size, device=self.part.device))

    def read(self) -> Tensor:
        return self.part.consumer_weight.unsqueeze(1)

    def parameters(
        self, of: Callable[[Tensor], Tensor] = lambda parameter: parameter
    ) -> list[Tensor]:
        mlp = self.part

        def inputs_first(module: nn.Module) -> Tensor:
            assert isinstance(module.weight, Tensor)
            weight = of(module.weight)
            return weight.t() if isinstance(module, nn.Linear) else weight

        found = [
            part.t() for module, n in mlp.producers for part in inputs_first(module).chunk(n, 1)
        ]
        for module, n in mlp.producers:
            if isinstance(module.bias, Tensor):
                found += of(module.bias).unsqueeze(1).chunk(n)
        return [*found, inputs_first(mlp.consumer)]
