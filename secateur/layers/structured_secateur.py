"""Linear layers whose weight is a product of blocks, or of a dictionary and a sparse code.

Like the file of the base class, this one is written beside the weights of a checkpoint, and stands
alone with it.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from .factored_secateur import Factored, Layout, Spec

MOST_ATOMS = 2**15  # an index is an int16


class Monarch(Factored):
    """Ŵ = P₂ᵀ blkdiag(second) P₁ blkdiag(first), two maps by blocks with permutations between.

    ``first`` has a map (middle, inputs / in_blocks) for every block of neighbouring inputs; what
    they give, laid out block by block, is dealt in turns to the ``out_blocks`` maps of ``second``,
    whose outputs are dealt in turns, too: output i is number i // out_blocks of map i % out_blocks.
    So a pair of an input block and an output block is joined by a map of rank ``rank``.
    """

    first: Tensor
    second: Tensor
    form = "monarch"
    numbers: ClassVar[tuple[str, ...]] = ("in_blocks", "out_blocks", "rank")

    @classmethod
    def blocks(cls, spec: Spec) -> tuple[int, int, int]:
        """Blocks of inputs, blocks of outputs, and what is between for one block of inputs."""
        return spec["in_blocks"], spec["out_blocks"], spec["out_blocks"] * spec["rank"]

    @classmethod
    def problem(cls, spec: Spec) -> str | None:
        before, behind, _ = cls.blocks(spec)
        if spec["inputs"] % before or spec["outputs"] % behind:
            return f"{before} blocks should divide the inputs, {behind} the outputs"
        most = min(spec["inputs"] // before, spec["outputs"] // behind)
        return f"rank should be at most {most}" if spec.get("rank", 1) > most else None

    @classmethod
    def tensors(cls, spec: Spec) -> Layout:
        before, behind, middle = cls.blocks(spec)
        return {
            "first": ((before, middle, spec["inputs"] // before), None),
            "second": ((behind, spec["outputs"] // behind, before * middle // behind), None),
        }

    @classmethod
    def multiplications(cls, spec: Spec) -> int:
        before, behind, middle = cls.blocks(spec)
        return middle * (int(spec["inputs"]) + before * int(spec["outputs"]) // behind)

    def dense(self) -> Tensor:
        """What the layer makes of every input by itself: shuffles and all."""
        eye = torch.eye(self.in_features, dtype=self.first.dtype, device=self.first.device)
        return self._product(eye).t().contiguous()

    def forward(self, x: Tensor) -> Tensor:
        if self.merged(x):
            return super().forward(x)
        output = self._product(x.reshape(-1, self.in_features))
        output = output.reshape(*x.shape[:-1], self.out_features)
        return output if self.bias is None else output + self.bias

    def _product(self, x: Tensor) -> Tensor:
        """Of rows x (tokens, inputs)."""
        first, second = self.first, self.second
        parts = x.unflatten(1, (len(first), -1)).transpose(0, 1)  # (in_blocks, tokens, …)
        middle = (parts @ first.mT).transpose(0, 1).flatten(1)
        dealt = middle.unflatten(1, (-1, len(second))).movedim(2, 0)  # (out_blocks, tokens, …)
        output: Tensor = dealt @ second.mT  # (out_blocks, tokens, …)
        return output.permute(1, 2, 0).flatten(1)


class BlockShuffle(Monarch):
    """Monarch with as many blocks before as behind, and no narrower between than at its ends."""

    form = "block_shuffle"
    numbers = ("blocks",)

    @classmethod
    def blocks(cls, spec: Spec) -> tuple[int, int, int]:
        count = spec["blocks"]
        return count, count, min(spec["outputs"], spec["inputs"]) // count


class BlockDense(Monarch):
    """Ŵ = second · blkdiag(first): every block of inputs has a map of rank ``rank`` of its own."""

    form = "block_dense"
    numbers = ("blocks", "rank")

    @classmethod
    def blocks(cls, spec: Spec) -> tuple[int, int, int]:
        return spec["blocks"], 1, spec["rank"]


class Dictionary(Factored):
    """Every row of Ŵ, block by block of inputs, is a sum of ``nonzeros`` of a block's ``atoms``.

    ``first`` has the atoms of every block, (blocks, atoms, inputs / blocks), ``second`` what they
    are multiplied by, (blocks, outputs, nonzeros), in the order of the atoms. Which ones they are
    is in ``mask``, a bit for every atom, lowest bit first, or in ``indices``, whatever is smaller.
    """

    first: Tensor
    second: Tensor
    mask: Tensor
    indices: Tensor
    form = "dictionary"
    numbers = ("blocks", "atoms", "nonzeros")
    densified = True

    @classmethod
    def problem(cls, spec: Spec) -> str | None:
        if spec["inputs"] % spec["blocks"]:
            return f"{spec['blocks']} blocks should divide the inputs"
        most = cls.most_atoms(spec)
        if spec["atoms"] > most:
            return f"atoms should be at most {most}"
        most = min(spec["atoms"], spec["inputs"] // spec["blocks"])
        return f"nonzeros should be at most {most}" if spec["nonzeros"] > most else None

    @classmethod
    def tensors(cls, spec: Spec) -> Layout:
        blocks, atoms, nonzeros = spec["blocks"], spec["atoms"], spec["nonzeros"]
        index = torch.uint8 if atoms <= 256 else torch.int16
        mask = (atoms + 7) // 8
        smaller = nonzeros * index.itemsize < mask
        return {
            "first": ((blocks, atoms, spec["inputs"] // blocks), None),
            "second": ((blocks, spec["outputs"], nonzeros), None),
            "indices" if smaller else "mask": (
                (blocks, spec["outputs"], nonzeros if smaller else mask),
                index if smaller else torch.uint8,
            ),
        }

    @classmethod
    def most_atoms(cls, spec: Spec) -> int:
        """How many there may be; as many as outputs would be the weight itself."""
        return min(int(spec["outputs"]), MOST_ATOMS)

    @classmethod
    def support(cls, spec: Spec, chosen: Tensor) -> dict[str, Tensor]:
        """What stores the atoms that are chosen, (blocks, outputs, atoms) of truth values."""
        if "indices" in cls.tensors(spec):
            dtype = cls.tensors(spec)["indices"][1]
            found = chosen.nonzero()[:, 2].unflatten(0, (*chosen.shape[:2], -1))
            return {"indices": found.to(dtype)}
        bits = torch.nn.functional.pad(chosen, (0, -chosen.shape[2] % 8)).unflatten(2, (-1, 8))
        places = torch.arange(8, device=chosen.device)
        return {"mask": (bits.long() << places).sum(3).to(torch.uint8)}

    def chosen(self) -> Tensor:
        """Which atoms every row has, (blocks, outputs, atoms).

        Raises:
            ValueError: what is stored doesn't choose ``nonzeros`` atoms in every row.
        """
        atoms, nonzeros = self.spec["atoms"], self.spec["nonzeros"]
        if "mask" in self.tensors(self.spec):
            places = torch.arange(8, dtype=torch.uint8, device=self.second.device)
            found = ((self.mask.unsqueeze(3) >> places) & 1).bool().flatten(2)
            sound = not bool(found[..., atoms:].any())
            found = found[..., :atoms]
        else:
            where = self.indices.long()
            sound = bool(((where >= 0) & (where < atoms)).all())
            found = torch.zeros(*where.shape[:2], atoms, dtype=torch.bool, device=where.device)
            found.scatter_(2, where.clamp(0, atoms - 1), True)
        if not sound or bool((found.sum(2) != nonzeros).any()):
            raise ValueError(f"spec {self.spec}: a row doesn't have {nonzeros} of {atoms} atoms.")
        return found

    def dense(self) -> Tensor:
        chosen = self.chosen()
        codes = self.second.new_zeros(chosen.shape)
        codes[chosen] = self.second.flatten()
        return (codes @ self.dictionary()).transpose(0, 1).flatten(1)

    def dictionary(self) -> Tensor:
        """The atoms, (blocks, atoms, inputs / blocks)."""
        return self.first

    def forward(self, x: Tensor | None) -> Tensor:
        """As ever; without x the atoms, for layers that share them.

        They ask by a call, as who keeps weights on disk brings them back for calls alone.
        """
        return self.dictionary() if x is None else super().forward(x)


class Codes(Dictionary):
    """As :class:`Dictionary`, with the atoms of another layer in its block that reads the same.

    The spec has the path of that layer in the block as ``of``.
    """

    form = "codes"
    others = ("of",)

    def make(self) -> None:
        super().make()
        self._leader: tuple[Dictionary, ...] = ()  # in a tuple, so that it is no part of this one

    @classmethod
    def most_atoms(cls, spec: Spec) -> int:
        return MOST_ATOMS  # the layer that has them may have more outputs

    @classmethod
    def tensors(cls, spec: Spec) -> Layout:
        found = super().tensors(spec)
        del found["first"]
        return found

    def follow(self, layers: Mapping[str, nn.Module]) -> None:
        path, shared = self.spec["of"], ("inputs", "blocks", "atoms")
        leader = layers.get(path)
        if type(leader) is not Dictionary or any(leader.spec[n] != self.spec[n] for n in shared):
            raise ValueError(
                f"spec {self.spec}: {path!r} is no dictionary of as many inputs, blocks and atoms."
            )
        self._leader = (leader,)

    def dictionary(self) -> Tensor:
        atoms: Tensor = self._leader[0](None)
        return atoms.to(self.second)
