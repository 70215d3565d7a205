"""Linear layers whose weight has another form than one dense matrix.

This file is written beside the weights of checkpoints of the factored tier, so it stands alone: it
imports torch, never secateur. A layer is described by a spec, plain JSON from ``config.json``:

    {"form": "low_rank", "outputs": 768, "inputs": 256, "bias": false, "rank": 64}

The tensors that it holds follow from the spec alone (``tensors``), the same on every machine and
for every backend; what a kernel wants in another order is made from them after loading. A form that
computes with its dense weight makes that once, at the first forward pass, and keeps it beside the
packed tensors: it saves bytes on disk and nothing else.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

Spec = dict[str, Any]
#: of every tensor of a layer the shape, and the dtype where it is not the model's own
Layout = dict[str, tuple[tuple[int, ...], torch.dtype | None]]


class Factored(nn.Module):
    """y = x Ŵᵀ + b, with a weight Ŵ (outputs, inputs) made of the tensors that a spec describes.

    Raises:
        ValueError: the spec is not one of this form, or a number in it is out of bounds.
    """

    form: ClassVar[str]
    #: the names of the numbers in a spec of this form, beside those of every form
    numbers: ClassVar[tuple[str, ...]] = ()
    #: names in a spec under which it has the path of another linear of the block
    others: ClassVar[tuple[str, ...]] = ()
    #: whether it computes with its dense weight
    densified: ClassVar[bool] = False

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.check(spec)
        self.spec = dict(spec)
        self.out_features, self.in_features = spec["outputs"], spec["inputs"]
        self._made: tuple[Tensor, ...] = ()  # the dense weight, where it was needed
        self._few = 0  # tokens for which the dense weight is used
        self.make()
        if spec["bias"]:
            self.bias = nn.Parameter(torch.empty(spec["outputs"]))
        else:
            self.register_parameter("bias", None)

    def make(self) -> None:
        """Make room for the tensors."""
        for name, (shape, dtype) in self.tensors(self.spec).items():
            if dtype is None:
                self.register_parameter(name, nn.Parameter(torch.empty(shape)))
            else:
                self.register_buffer(name, torch.empty(shape, dtype=dtype))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """What a dense weight is made of once can't be trained, whoever puts it there."""
        if self.densified and name != "bias" and param is not None:
            param.requires_grad_(False)
        super().register_parameter(name, param)

    @property
    def weight(self) -> Tensor:
        """Empty: of a linear's weight some families ask the number format and the device."""
        own = next(p for name, p in self.named_parameters() if name != "bias")
        return own.detach().new_empty(0)

    @classmethod
    def check(cls, spec: Spec) -> None:
        """Refuse a spec that is not of this form, before any memory is taken."""
        wanted = {"outputs", "inputs", *cls.numbers}
        named = set(spec) == wanted | {"form", "bias", *cls.others} and spec["form"] == cls.form
        paths = named and all(isinstance(spec[name], str) for name in cls.others)
        if not paths or not isinstance(spec["bias"], bool):
            also = "".join(f", the path of a linear as {name!r}" for name in cls.others)
            raise ValueError(
                f"spec {str(spec)[:200]}: one of form {cls.form!r} has a truth value for bias"
                f"{also}, and whole numbers {', '.join(sorted(wanted))}."
            )
        for name in wanted:
            if type(spec[name]) is not int or not 0 < spec[name] < 2**31:
                raise ValueError(f"spec {spec}: {name} should be a whole number above 0.")
        problem = cls.problem(spec)
        if problem is not None:
            raise ValueError(f"spec {spec}: {problem}.")

    @classmethod
    def problem(cls, spec: Spec) -> str | None:
        """What is wrong with the numbers of a spec, if anything is."""
        return None

    def follow(self, layers: Mapping[str, nn.Module]) -> None:
        """Find the layers that it takes tensors from, among its block's; most have all their own.

        Raises:
            ValueError: a layer is not there, or not what the spec needs.
        """

    @classmethod
    def tensors(cls, spec: Spec) -> Layout:
        """The tensors of a spec; the bias, which every form keeps, is left out."""
        raise NotImplementedError

    @classmethod
    def multiplications(cls, spec: Spec) -> int:
        """Multiplications for one token, as it computes."""
        outputs: int = spec["outputs"]
        return outputs * int(spec["inputs"])  # with the dense weight

    def dense(self) -> Tensor:
        """The weight that it stands for, (outputs, inputs)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """What the dense weight would make of x (…, inputs): (…, outputs)."""
        if not self._made or self._made[0].dtype != x.dtype or self._made[0].device != x.device:
            with torch.inference_mode(False), torch.no_grad():  # may be read while training, too
                self._made = (self.dense().to(x),)
        return nn.functional.linear(x, self._made[0], self.bias)

    def premerge(self, tokens: int = 16) -> None:
        """Use the dense weight for up to so many tokens, as when text is written; 0 for never.

        One product is faster than several where there is little to multiply. The dense weight is
        then kept in memory beside its factors. Where gradients are asked for, factors are used.
        """
        self._few = tokens
        self.forget()

    def merged(self, x: Tensor) -> bool:
        """Whether x (…, inputs) has so few tokens that it meets the dense weight."""
        few = 0 < x.numel() <= self._few * self.in_features
        return few and not (self.training or torch.is_grad_enabled())

    def train(self, mode: bool = True) -> Self:
        self.forget()
        return super().train(mode)

    def forget(self) -> None:
        """Make the dense weight again when it is needed next; its tensors have changed."""
        self._made = ()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.forget()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.forget()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.spec.items())


class LowRank(Factored):
    """Ŵ = B A, with A (rank, inputs) read first and B (outputs, rank) second."""

    form = "low_rank"
    numbers = ("rank",)

    def make(self) -> None:
        rank = self.spec["rank"]
        self.first = nn.Linear(self.in_features, rank, bias=False)
        self.second = nn.Linear(rank, self.out_features, bias=False)

    @classmethod
    def problem(cls, spec: Spec) -> str | None:
        most = min(spec["outputs"], spec["inputs"])
        return f"rank should be at most {most}" if spec["rank"] > most else None

    @classmethod
    def tensors(cls, spec: Spec) -> Layout:
        rank = spec["rank"]
        return {
            "first.weight": ((rank, spec["inputs"]), None),
            "second.weight": ((spec["outputs"], rank), None),
        }

    @classmethod
    def multiplications(cls, spec: Spec) -> int:
        rank: int = spec["rank"]
        return rank * int(spec["outputs"] + spec["inputs"])

    def dense(self) -> Tensor:
        return self.second.weight @ self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.merged(x):
            return super().forward(x)
        output: Tensor = self.second(self.first(x))
        return output if self.bias is None else output + self.bias


TRITS = 5  # that a byte holds: 3⁵ = 243 numbers


class Ternary(Factored):
    """Ŵ = a₁ T₁ + a₂ T₂ of two planes of −1, 0 and 1, with scales for every group of inputs.

    ``codes`` has the planes one behind the other, each row by itself, with five trits to a byte:
    the sum of (t + 1) 3^i. ``scales`` has the a of each.
    """

    form = "trits"
    numbers = ("group",)
    densified = True
    codes: Tensor
    scales: Tensor

    @classmethod
    def problem(cls, spec: Spec) -> str | None:
        return "group should divide inputs" if spec["inputs"] % spec["group"] else None

    @classmethod
    def tensors(cls, spec: Spec) -> Layout:
        outputs, inputs = spec["outputs"], spec["inputs"]
        return {
            "codes": ((2, outputs, -(-inputs // TRITS)), torch.uint8),
            "scales": ((2, outputs, inputs // spec["group"]), None),
        }

    def dense(self) -> Tensor:
        if int(self.codes.max()) >= 3**TRITS:
            raise ValueError(f"codes of a layer {self.spec} are above {3**TRITS - 1}.")
        trits = unpacked_trits(self.codes, self.in_features).to(self.scales)
        groups = trits.unflatten(-1, (-1, self.spec["group"]))
        weight: Tensor = (self.scales.unsqueeze(-1) * groups).sum(0).flatten(1)
        return weight


def packed_trits(trits: Tensor) -> Tensor:
    """Ternary (…, count) as bytes (…, ⌈count / 5⌉)."""
    digits = nn.functional.pad(trits.long() + 1, (0, -trits.shape[-1] % TRITS))
    places = 3 ** torch.arange(TRITS, device=trits.device)
    codes: Tensor = (digits.unflatten(-1, (-1, TRITS)) * places).sum(-1).to(torch.uint8)
    return codes


def unpacked_trits(codes: Tensor, count: int) -> Tensor:
    """The first ``count`` trits of bytes (…, bytes)."""
    places = 3 ** torch.arange(TRITS, device=codes.device)
    digits = codes.long().unsqueeze(-1) // places % 3 - 1
    return digits.flatten(-2)[..., :count]
