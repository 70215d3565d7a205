"""Round to nearest: weights as whole numbers of few bits, in groups with a scale."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from secateur.layers.integers import BITS, Integers, missing_library
from secateur.linalg.int_rounding import best_scale, codes_of
from secateur.methods.form import FormMethod, Metric
from secateur.models.block import Linear
from secateur.structure.form import Form
from secateur.structure.parametrizations import integer_form, nearest_divisors
from secateur.utils.options import option, whole_numbers

if TYPE_CHECKING:
    from secateur.models.model import Model


@dataclass(frozen=True)
class RTN(FormMethod):
    """Quantize each weight to the nearest multiple of its group's scale.

        q = clamp(round(w / s), −2^(b−1), 2^(b−1) − 1),   ŵ = q s

    Of some scales, from max|w| / (2^(b−1) − 1), which clips nothing, down to half of that, a group
    takes the one with the least ‖w − ŵ‖². Scales are rounded to the checkpoint's own format before
    anything is divided by them. Don't use it if you have calibration data: ``gptq`` takes the
    same bytes.

    Source: the common baseline.
    """

    bits: str = option(
        "4", "bits per weight, 3 to 8; several, as in 3,4,8, for the allocator to mix"
    )
    group: str = option(
        "128",
        "group size: inputs that share a scale; of several the largest that divides; 0 for rows",
    )
    scale_steps: int = option(20, "scales tried per group; 1 for the scale that clips nothing", 1)

    name: ClassVar[str] = "rtn"
    summary: ClassVar[str] = "quantizes to integers by rounding to nearest"
    source: ClassVar[str] = "a baseline"
    data_aware: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._bits()
        self._groups()

    def _groups(self) -> tuple[int, ...]:
        return whole_numbers(self, "group", 0, 2**20)

    def _group(self, inputs: int) -> int | None:
        """The largest that divides the inputs, 0 where none does and that is allowed."""
        dividing = (size for size in reversed(self._groups()) if not size or inputs % size == 0)
        return next(dividing, None)

    def _bits(self) -> tuple[int, ...]:
        return whole_numbers(self, "bits", BITS[0], BITS[-1])

    @classmethod
    def among_others(cls) -> "RTN":
        """With 3, 4 and 8 bits, whatever the inputs."""
        return cls(bits="3,4,8", group="0,16,32,64,128")

    @property
    def final(self) -> bool:
        """Integers come last: what reads them makes dense weights of them."""
        return True

    def forms(self, outputs: int, inputs: int, bias: bool) -> Sequence[Form]:
        """One for each number of bits, where groups divide the inputs."""
        group = self._group(inputs)
        if group is None:
            return []
        return [integer_form(outputs, inputs, bias, bits, group) for bits in self._bits()]

    def offered(self, group: Sequence[Linear], model: "Model") -> Sequence[Form]:
        """None for a Conv1D, which the format has not.

        A form says in which number format its scales are: the checkpoint's.
        """
        if not all(isinstance(linear.module, nn.Linear) for linear in group):
            return []
        scales = {"scales": str(model.stored).removeprefix("torch.")}
        own = super().offered(group, model)
        return [replace(form, spec={**form.spec, **scales}) for form in own]

    def obstacle(self, model: "Model") -> str | None:
        """No linear layers, groups that divide no inputs, or no library to read the result."""
        layers = [layer.module for block in model.blocks for layer in block.linear_layers]
        inputs = {layer.in_features for layer in layers if isinstance(layer, nn.Linear)}
        if not inputs:
            return "its weights are those of Conv1D layers, which the integer format has not"
        if all(self._group(count) is None for count in inputs):
            smallest = min(self._groups())
            return (
                f"groups of {self.group} divide the inputs of none of its layers; nearest are "
                f"{nearest_divisors(inputs, smallest)}, and --group 0 gives each row one scale"
            )
        return super().obstacle(model) or missing_library()

    def rounded(
        self, weight: Tensor, metric: Metric, form: Form, stored: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Codes (outputs, inputs) and scales (outputs, groups)."""
        bits, groups = form.spec["bits"], weight.unflatten(1, (-1, width(form)))
        scale = best_scale(groups, bits, self.scale_steps, stored)
        return codes_of(groups, scale.unsqueeze(-1), bits).flatten(1), scale

    def reshaped(self, weight: Tensor, metric: Metric, form: Form) -> dict[str, Tensor]:
        """Codes and scales, not packed yet."""
        stored: torch.dtype = getattr(torch, form.spec["scales"])
        codes, scale = self.rounded(weight, metric, form, stored)
        return {"codes": codes, "scale": scale}

    def layer(
        self, weight: Tensor, metric: Metric, form: Form, bias: Tensor | None, dtype: torch.dtype
    ) -> nn.Module:
        """A linear layer that is stored packed."""
        made, spec = self.reshaped(weight, metric, form), form.spec
        return Integers(
            spec["bits"], spec["group"], made["codes"], made["scale"], bias=bias, dtype=dtype
        )


def width(form: Form) -> int:
    """Inputs that share a scale."""
    found: int = form.spec["group"] or form.spec["inputs"]
    return found
