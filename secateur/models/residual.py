"""The residual stream as a unit that runs through all blocks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from secateur.families import Anatomy
from secateur.models.block import Block
from secateur.models.parts import View
from secateur.structure.narrowing import Narrowing
from secateur.structure.units import EVERY_BLOCK, WHOLE_HEADS, Residual


class ResidualView(View):
    """The width of the residual stream.

    It is narrowed by ``apply/residual_slicing.py``, since its surgery needs what passes between
    blocks.
    """

    kind = "residual"

    def __init__(
        self, module: PreTrainedModel, blocks: Sequence[Block], anatomy: Anatomy | None
    ) -> None:
        self.module, self.blocks, self.anatomy = module, blocks, anatomy

    @property
    def obstacle(self) -> str | None:
        if self.anatomy is None or self.anatomy.pre_norm is not None:
            return None
        return (
            "the residual stream stays at full width: it turns to another basis only where all "
            "that reads it is behind RMS norms, ahead of attention and of the MLP, which add to it"
        )

    def unit(self, multiple_of: int, biased: bool) -> Residual | None:
        if self.obstacle is not None:
            return None
        blocks, parts = self.blocks, [u for b in self.blocks for u in b.units(1, WHOLE_HEADS)]
        readers = [linear for b in blocks for linear in (b.attention.module.o_proj, b.mlp.consumer)]
        embedding: Any = self.module.get_input_embeddings()
        head: Any = self.module.get_output_embeddings()
        tied = head.weight is embedding.weight
        return Residual(
            name="residual",
            block=EVERY_BLOCK,
            size=parts[0].hidden,
            step=multiple_of,
            hidden=parts[0].hidden,
            least=1,
            parts=tuple(parts),
            shortcuts=2 * len(blocks),
            norms=2 * len(blocks) + 1,
            biases=sum(linear.bias is not None for linear in readers),
            embeddings=len(embedding.weight) + (0 if tied else len(head.weight)),
            tied=len(head.weight) if tied else 0,
        )

    def narrow(self, narrowing: Narrowing) -> None:
        raise AssertionError("the residual stream is sliced place by place")

    @contextmanager
    def kept(self) -> Iterator[None]:
        raise AssertionError("the residual stream is sliced place by place")
        yield
