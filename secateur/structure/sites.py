"""Places in a block where activations are seen."""

import re
from typing import NamedTuple

BLOCK = "block"  #: the path of sites that belong to no part of a block, but to all of it


class Site(NamedTuple):
    """A place in a block where activations are seen.

    Attributes:
        path: the part of the block: "mlp", "attention", "mlp2" for a second MLP and so on, or
            "block" for the block as a whole. It is the same in every model family.
        side: what is seen there. Of an MLP "mlp_inputs" and "hidden" (its channels, as the consumer
            reads them). Of an attention "attention_inputs", "query" and "key" (heads before
            rotation, after any norm inside them), "value" (heads without bias), "mixed" (values
            without bias, mixed by attention, as the output projection reads them),
            "output_inputs" (the same with bias) and "scores". Of a block "block" (its input and
            output), "between" (the residual stream behind attention) and "behind".
    """

    path: str
    side: str

    @property
    def id(self) -> str:
        """What it is called in files; never changes, since kept statistics are found by it."""
        return f"{self.path}.{self.side}" if self.path[-1:].isdigit() else self.side

    @property
    def role(self) -> str:
        """The path of the first part of its kind: "mlp" for "mlp2"."""
        return re.sub(r"\d+$", "", self.path)

    def at(self, path: str) -> "Site":
        """The same side of another part."""
        return Site(path, self.side)


def part_name(role: str, number: int) -> str:
    """The path of the part with a number, from 0, among those with the same role in a block."""
    return role if number == 0 else f"{role}{number + 1}"
