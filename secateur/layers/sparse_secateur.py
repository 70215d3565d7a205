"""Linear layers most of whose weights are zero: any of them, N of every M, or wrapped.

This file is written beside the weights of checkpoints of the factored tier, so it stands alone: it
imports torch and the file of factored layers, never secateur.

All of them compute with their dense weight, and save bytes on disk alone. The exception is 2:4 on
a GPU that has a kernel for it, which is used for many tokens at once, where it pays, after it has
been held against the dense product; the dense weight then stays beside it for few tokens.
"""

import warnings

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .factored_secateur import Factored, Layout, Spec

MANY = 64  #: rows from which a 2:4 kernel may be faster than a dense product
WITHIN = 0.02  #: how far, relatively, a kernel's product may be from the dense one

MOST = 256  #: inputs in a group


class Sparse(Factored):
    """Ŵ has ``count`` weights that are not zero, wherever they are.

    ``mask`` (outputs, inputs / 8 rounded up) has a bit for every weight, the first in the lowest
    bit of a byte; ``values`` (count) are those whose bit is set, row by row.
    """

    form = "sparse"
    numbers = ("count",)
    densified = True
    mask: Tensor
    values: Tensor

    @classmethod
    def problem(cls, spec: Spec) -> str | None:
        most = spec["outputs"] * spec["inputs"]
        return f"count should be at most {most}" if spec["count"] > most else None

    @classmethod
    def tensors(cls, spec: Spec) -> Layout:
        row = -(-spec["inputs"] // 8)
        return {
            "mask": ((spec["outputs"], row), torch.uint8),
            "values": ((spec["count"],), None),
        }

    def dense(self) -> Tensor:
        mask = unpacked(self.mask, self.in_features)
        found = int(mask.sum())
        if found != len(self.values):
            raise ValueError(f"{self.spec}: its mask has {found} weights, not count.")
        weight = self.values.new_zeros(mask.shape)
        return weight.masked_scatter_(mask, self.values)


class TwoOfFour(Factored):
    """What has a 2:4 matrix in it, for which there may be a kernel."""

    densified = True
    values: Tensor
    codes: Tensor

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self._kernels: dict[tuple[torch.dtype, torch.device], Tensor | None] = {}

    def core(self) -> Tensor:
        """The 2:4 matrix, (outputs, inputs)."""
        raise NotImplementedError

    def kernel(self, x: Tensor) -> Tensor | None:
        """The matrix for a kernel, where one can be trusted and x has rows enough for it to pay."""
        few = x.numel() < MANY * self.in_features
        if few or x.requires_grad or not has_kernel(x, self.out_features, self.in_features):
            return None
        key = x.dtype, x.device
        if key not in self._kernels:
            with torch.inference_mode(False), torch.no_grad():
                self._kernels[key] = trusted(self.core().to(x))
        return self._kernels[key]

    def forget(self) -> None:
        super().forget()
        self._kernels = {}


class NM(TwoOfFour):
    """Of every ``m`` consecutive inputs, ``n`` weights of each row are not zero.

    ``values`` (outputs, inputs · n / m) are those, in order. ``codes`` (outputs, bytes) say where
    they are, in whatever takes fewer bits: the place of each in its group, in as few bits as m - 1
    needs, or a bit for every weight. Places if both are equal, as for 2:4. The lowest bit is first.
    """

    form = "n_m"
    numbers = ("n", "m")

    @classmethod
    def problem(cls, spec: Spec) -> str | None:
        if spec["n"] >= spec["m"]:
            return "n should be below m"
        if spec["m"] > MOST:
            return f"m should be at most {MOST}"
        return "m should divide inputs" if spec["inputs"] % spec["m"] else None

    @classmethod
    def tensors(cls, spec: Spec) -> Layout:
        n, m, groups = spec["n"], spec["m"], spec["inputs"] // spec["m"]
        row = -(-groups * min(n * place_bits(m), m) // 8)
        return {
            "values": ((spec["outputs"], groups * n), None),
            "codes": ((spec["outputs"], row), torch.uint8),
        }

    def dense(self) -> Tensor:
        mask = decoded(self.codes, self.in_features, self.spec["n"], self.spec["m"])
        return self.values.new_zeros(mask.shape).masked_scatter_(mask, self.values)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel(x) if (self.spec["n"], self.spec["m"]) == (2, 4) else None
        return super().forward(x) if kernel is None else linear(x, kernel, self.bias)

    def core(self) -> Tensor:
        return self.dense()


class ArmorLinear(TwoOfFour):
    """Ŵ = A S B: a 2:4 core S between block-diagonal A and B, all of whose blocks are square.

    ``left`` (outputs / block, block, block) are A's blocks, ``right`` (inputs / block, block,
    block) those of B, ``values`` and ``codes`` are S as in a layer of form ``n_m``. Without a 2:4
    kernel S would be computed dense as well, so A and B would come on top of a whole product; one
    with the dense Ŵ is less.
    """

    form = "armor"
    numbers = ("block",)
    left: Tensor
    right: Tensor

    @classmethod
    def problem(cls, spec: Spec) -> str | None:
        block = spec["block"]
        if block % 4:
            return "4 should divide block"
        if spec["outputs"] % block or spec["inputs"] % block:
            return "block should divide outputs and inputs"
        return None

    @classmethod
    def tensors(cls, spec: Spec) -> Layout:
        block = spec["block"]
        return {
            "left": ((spec["outputs"] // block, block, block), None),
            "right": ((spec["inputs"] // block, block, block), None),
            **NM.tensors(spec | {"n": 2, "m": 4}),
        }

    def core(self) -> Tensor:
        mask = decoded(self.codes, self.in_features, 2, 4)
        return self.values.new_zeros(mask.shape).masked_scatter_(mask, self.values)

    def dense(self) -> Tensor:
        wide = torch.promote_types(self.values.dtype, torch.float32)  # three factors, rounded once
        left, core, right = (t.to(wide) for t in (self.left, self.core(), self.right))
        inner = blockwise(blockwise(core, right.mT).t(), left).t()
        return inner.to(self.values.dtype).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel(x)
        if kernel is None:
            return super().forward(x)
        output = blockwise(linear(blockwise(x, self.right), kernel), self.left)
        return output if self.bias is None else output + self.bias


def blockwise(x: Tensor, blocks: Tensor) -> Tensor:
    """x (…, k · b) times the transpose of the block-diagonal matrix of ``blocks`` (k, b, b)."""
    parts = x.unflatten(-1, blocks.shape[:2])
    output: Tensor = torch.einsum("...kj,kij->...ki", parts, blocks)
    return output.flatten(-2)


def packed(bits: Tensor) -> Tensor:
    """Bits (…, n) as bytes (…, n / 8 rounded up), the first in the lowest bit of a byte."""
    full = nn.functional.pad(bits.to(torch.uint8), (0, -bits.shape[-1] % 8)).unflatten(-1, (-1, 8))
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=bits.device)
    codes: Tensor = (full * powers).sum(-1, dtype=torch.uint8)
    return codes


def unpacked(codes: Tensor, count: int) -> Tensor:
    """The first ``count`` bits of bytes (…, n)."""
    places = torch.arange(8, dtype=torch.uint8, device=codes.device)
    return (codes.unsqueeze(-1) >> places & 1).flatten(-2)[..., :count].bool()


def place_bits(m: int) -> int:
    """Bits of a place in a group of ``m``."""
    return (m - 1).bit_length()


def encoded(mask: Tensor, n: int, m: int) -> Tensor:
    """The codes of a mask (outputs, inputs) that has ``n`` of every ``m``."""
    bits = place_bits(m)
    if n * bits > m:
        return packed(mask)
    groups = mask.view(len(mask), -1, m)
    places = groups.nonzero()[:, 2].view(*groups.shape[:2], n)
    digits = places.unsqueeze(-1) >> torch.arange(bits, device=mask.device) & 1
    return packed(digits.flatten(1))


def decoded(codes: Tensor, inputs: int, n: int, m: int) -> Tensor:
    """The mask of codes.

    Raises:
        ValueError: they don't say which ``n`` of every ``m``.
    """
    bits, groups = place_bits(m), inputs // m
    mask: Tensor
    if n * bits > m:
        mask = unpacked(codes, inputs).unflatten(1, (groups, m))
        sound = mask.sum(-1) == n
    else:
        digits = unpacked(codes, groups * n * bits).view(len(codes), groups, n, bits)
        places = (digits << torch.arange(bits, device=codes.device)).sum(-1)
        sound = (places < m).all(-1) & (places.diff(dim=-1) > 0).all(-1)
        mask = torch.zeros(len(codes), groups, m, dtype=torch.bool, device=codes.device)
        mask.scatter_(2, places.clamp_max(m - 1), True)
    if not bool(sound.all()):
        raise ValueError(f"codes of a layer don't say which {n} of every {m} weights there are.")
    return mask.flatten(1)


def has_kernel(x: Tensor, outputs: int, inputs: int) -> bool:
    """Whether the device of x may have a kernel for a 2:4 weight in the format of x."""
    return (
        x.is_cuda
        and x.dtype in (torch.float16, torch.bfloat16)
        and outputs % 32 == 0
        and inputs % 64 == 0
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )


def trusted(weight: Tensor) -> Tensor | None:
    """A 2:4 weight as the kernel wants it; None, with a warning, where its product is wrong."""
    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(MANY, weight.shape[1], generator=generator, device=weight.device).to(weight)
    expected = linear(x, weight).float()
    try:
        made: Tensor = torch.sparse.to_sparse_semi_structured(weight)
        difference = linear(x, made).float() - expected
    except RuntimeError as error:  # as torch says of a GPU that it has none for
        reason = str(error).partition("\n")[0]
        warnings.warn(f"no 2:4 kernel, dense products instead: {reason}", stacklevel=3)
        return None
    if not bool(difference.norm() <= WITHIN * expected.norm()):
        warnings.warn("the 2:4 kernel is wrong here; dense products instead", stacklevel=3)
        return None
    return made
