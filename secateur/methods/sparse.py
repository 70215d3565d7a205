"""What methods share that zero weights: which patterns there are, and what holds them."""

import math
import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from secateur.layers.factored_secateur import Spec
from secateur.layers.sparse_secateur import MOST, encoded, packed
from secateur.methods.form import FormMethod, Metric
from secateur.structure.form import Form
from secateur.structure.parametrizations import form_of
from secateur.structure.units import Matrix
from secateur.utils.errors import InputError
from secateur.utils.options import option

if TYPE_CHECKING:
    from secateur.models.model import Model


@dataclass(frozen=True)
class SparseMethod(FormMethod):
    """Sets weights to zero and stores the others packed.

    A subclass says in :meth:`pruned` which stay, and as what. Layers compute with the dense
    weight, so don't use such a method for speed. Don't use it if you can quantize: all weights with
    four bits take fewer bytes than half of the weights with sixteen.

    Attributes:
        pattern: "2:4" for two of every four consecutive inputs, "*:4" for any number of every four;
            empty for weights wherever they are.
        grain: how finely densities are told apart, without a pattern.
        floor: the least density, but for one that the pattern names.
    """

    pattern: str = option(
        "", "N:M pattern of nonzeros, such as 2:4; *:M for any N; empty for unstructured"
    )
    grain: int = option(16, "without a pattern, densities are multiples of 1 / grain", 2, 4096)
    floor: float = option(0.5, "smallest density of a matrix", 0.0, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.group  # noqa: B018 (is refused here)

    @property
    def group(self) -> tuple[list[int], int] | None:
        """How many of how many inputs may stay; None without a pattern."""
        if not self.pattern:
            return None
        found = re.fullmatch(r"(\d{1,4}|\*|any):(\d{1,4})", self.pattern)
        if found is None:
            raise InputError(
                f"{self.name}: pattern={self.pattern!r} should be like '2:4' or '*:4', or empty."
            )
        m = int(found[2])
        if not 2 <= m <= MOST:
            near = min(max(m, 2), MOST)
            raise InputError(
                f"{self.name}: pattern={self.pattern!r}: M should be between 2 and {MOST}; the "
                f"nearest is '{found[1]}:{near}'."
            )
        if found[1] in ("*", "any"):
            return [n for n in range(1, m) if n >= self.floor * m], m
        n = int(found[1])
        if not 0 < n < m:
            near = min(max(n, 1), m - 1)
            raise InputError(
                f"{self.name}: pattern={self.pattern!r}: N should be above 0 and below M; the "
                f"nearest is '{near}:{m}'."
            )
        return [n], m

    def forms(self, outputs: int, inputs: int, bias: bool) -> Sequence[Form]:
        """Every density, or those of the pattern; none where M doesn't divide the inputs."""
        common: Spec = {"outputs": outputs, "inputs": inputs, "bias": bias}
        if self.group is None:
            parts = [inputs * level // self.grain for level in range(1, self.grain)]
            counts = sorted({part for part in parts if part >= max(1, self.floor * inputs)})
            return [
                form_of({"form": "sparse", "count": outputs * n, **common}, f"{n / inputs:.1%}")
                for n in counts
            ]
        ns, m = self.group
        if inputs % m:
            return []
        return [form_of({"form": "n_m", "n": n, "m": m, **common}, f"{n}:{m}") for n in ns]

    def obstacle(self, model: "Model") -> str | None:
        """No pattern divides any of the inputs, or nothing becomes smaller."""
        found = super().obstacle(model)
        if found is None or self.group is None:
            return found
        m = self.group[1]
        units = [unit for unit in self.units(model, 1) if isinstance(unit, Matrix)]
        inputs = sorted({unit.inputs for unit in units})
        if not inputs or any(size % m == 0 for size in inputs):
            return found
        common = math.gcd(*inputs)
        whole = [d for d in range(2, MOST + 1) if common % d == 0]
        some = [d for d in range(2, MOST + 1) if any(size % d == 0 for size in inputs)]
        near = min(whole or some, key=lambda d: (abs(d - m), d), default=None)
        advice = "" if near is None else f"; the nearest that does is --pattern '{self._of(near)}'"
        return (
            f"pattern {self.pattern!r}: {m} divides none of the numbers of inputs of its matrices "
            f"({', '.join(map(str, inputs))}){advice}"
        )

    def _of(self, m: int) -> str:
        """The pattern with another M, as near as can be."""
        n, _, old = self.pattern.partition(":")
        return f"{min(max(1, round(int(n) * m / int(old))), m - 1) if n.isdigit() else n}:{m}"

    @abstractmethod
    def pruned(self, weight: Tensor, metric: Metric, form: Form) -> tuple[Tensor, Tensor]:
        """The weight that a form gives, zeros and all, and a mask of what it stores."""

    def reshaped(self, weight: Tensor, metric: Metric, form: Form) -> dict[str, Tensor]:
        """What stays, row by row, and where it was."""
        found, mask = self.pruned(weight, metric, form)
        if form.spec["form"] == "sparse":
            return {"mask": packed(mask), "values": found[mask]}
        codes = encoded(mask, form.spec["n"], form.spec["m"])
        return {"codes": codes, "values": found[mask].view(len(found), -1)}

    def errors(
        self, weight: Tensor, metric: Metric, forms: Sequence[Form], judged: Metric | None = None
    ) -> list[float]:
        """Those of the weights, without packing them."""
        by = judged or metric
        return [by.error(weight - self.pruned(weight, metric, form)[0]) for form in forms]
