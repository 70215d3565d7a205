"""What to spend a budget on, under which constraints."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from secateur.structure.costs import Target
from secateur.structure.runtime_limits import Runtime, fitted
from secateur.structure.units import Unit
from secateur.utils.errors import InputError, nearest, shown

if TYPE_CHECKING:
    from secateur.methods.base import Method
    from secateur.models.model import Model

MAX_PASS = 2**24  # tokens whose time is measured
Tier = Literal["plain", "per-layer"]  #: what may be asked for
Written = Literal["plain", "per-layer", "factored"]  #: what a plan may need


@dataclass(frozen=True)
class Goal:
    """The currency of a budget and the constraints on sizes.

    Attributes:
        target: what ``keep`` is a share of: "parameters", "bytes" or "flops" of what can shrink,
            "cache" (bytes of KV cache), or "latency" of the whole forward pass on this machine.
        tier: "plain" keeps the shape of attention and gives every MLP one width, so that stock
            classes load the result; "per-layer" lets every unit have its own size.
        multiple_of: MLP widths become multiples of this.
        batch: sequences in the forward pass that "latency" is measured on.
        length: tokens in each of them, none before them.
        runtime: what will read the result; sizes are such as it reads.
    """

    target: Target = "parameters"
    tier: Tier = "per-layer"
    multiple_of: int = 8
    batch: int = 1
    length: int = 256
    runtime: Runtime = "transformers"

    def __post_init__(self) -> None:
        if self.target in get_args(Runtime):
            raise InputError(
                f"--target says what --keep is a share of, and {self.target!r} is what reads the "
                f"result: ask for it by --for {self.target}, beside a --target or without."
            )
        if self.runtime not in get_args(Runtime):
            known = nearest(self.runtime, get_args(Runtime))
            raise InputError(f"unknown --for {shown(self.runtime)}. {known}")
        if self.target not in get_args(Target):
            known = nearest(self.target, get_args(Target))
            raise InputError(f"unknown --target {shown(self.target)}. {known}")
        if self.tier not in get_args(Tier):
            known = nearest(self.tier, get_args(Tier))
            raise InputError(f"unknown --tier {shown(self.tier)}. {known}")
        for name in ("multiple_of", "batch", "length"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)!r} should be at least 1.")
        if self.batch * self.length > MAX_PASS:
            raise InputError(
                f"latency of {self.batch} × {self.length} tokens: a forward pass has at most "
                f"{MAX_PASS}; ask for fewer with --latency-batch or --latency-length."
            )

    def units(self, method: "Method", model: "Model") -> list[Unit]:
        """The units of a method, with the sizes that the goal leaves them."""
        found = method.units(model, self.multiple_of)
        return [fitted(unit, self.runtime) for unit in found]
