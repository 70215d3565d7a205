"""Of several methods' forms, for each matrix the one that the budget is best spent on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from secateur.allocate.base import Allocator
from secateur.allocate.knapsack import Knapsack
from secateur.layers.integers import missing_library
from secateur.methods.form import FormMethod, Metric
from secateur.models.block import Linear
from secateur.structure.form import Form
from secateur.utils.errors import InputError, nearest
from secateur.utils.options import option

if TYPE_CHECKING:
    from secateur.models.model import Model


@dataclass(frozen=True)
class Forms(FormMethod):
    """Choose the form of each matrix among the forms of several methods.

    All forms of a matrix compete by bytes and by what they lose: with e(f) the output error of form
    f in the metric of what the layer reads, and the model's divergence measured at some of them,
    one budget of bytes is spent over all matrices at once. Don't use it if every layer must have
    the same form, as some runtimes require.

    Source: own composition; the parts name theirs.
    """

    of: str = option("svd-llm,svd", "methods whose forms compete, separated by commas")

    name: ClassVar[str] = "forms"
    summary: ClassVar[str] = (
        "chooses the form of each matrix among several methods by measured losses"
    )
    source: ClassVar[str] = "own composition"
    rereads: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.parts:
            raise InputError("forms: name at least one method, e.g. --of gptq,svd-llm.")

    @cached_property
    def parts(self) -> dict[str, FormMethod]:
        """The methods by name."""
        from secateur.methods import method_class

        found = {}
        for name in filter(None, map(str.strip, self.of.split(","))):
            kind = method_class(name)
            if kind is Forms or not issubclass(kind, FormMethod):
                raise InputError(f"forms: {name!r} keeps no width. {nearest(name, reshaping())}")
            found[name] = kind.among_others()
        return found

    @property
    def final(self) -> bool:
        """Whether one of the methods is."""
        return any(part.final for part in self.parts.values())

    @property
    def allocator(self) -> Allocator:
        """One budget by measured losses."""
        return Knapsack()

    def obstacle(self, model: "Model") -> str | None:
        """Nothing becomes smaller, or no library to read the result."""
        return super().obstacle(model) or (missing_library() if self.final else None)

    def forms(self, outputs: int, inputs: int, bias: bool) -> Sequence[Form]:
        """Those of all methods."""
        return self._signed(lambda part: part.forms(outputs, inputs, bias))

    def offered(self, group: Sequence[Linear], model: "Model") -> Sequence[Form]:
        """Likewise."""
        return self._signed(lambda part: part.offered(group, model))

    def _signed(self, of: Callable[[FormMethod], Sequence[Form]]) -> list[Form]:
        """The forms of every method, with its name on them."""
        return [
            replace(form, label=f"{name}: {form.label}", by=name)
            for name, part in self.parts.items()
            for form in of(part)
        ]

    def layer(
        self, weight: Tensor, metric: Metric, form: Form, bias: Tensor | None, dtype: torch.dtype
    ) -> nn.Module:
        """As its own method makes it."""
        part = self.parts[form.by]
        return part.layer(weight, part.seen(metric.gram), form, bias, dtype)

    def errors(
        self, weight: Tensor, metric: Metric, forms: Sequence[Form], judged: Metric | None = None
    ) -> list[float]:
        """By each method's own way, all in one metric."""
        found: dict[int, float] = {}
        for name, part in self.parts.items():
            own = [i for i, form in enumerate(forms) if form.by == name]
            of = [forms[i] for i in own]
            errors = part.errors(weight, part.seen(metric.gram), of, metric)
            found |= dict(zip(own, errors, strict=True))
        return [found[i] for i in range(len(forms))]

    def reshaped(self, weight: Tensor, metric: Metric, form: Form) -> dict[str, Tensor]:
        """As its own method does."""
        part = self.parts[form.by]
        return part.reshaped(weight, part.seen(metric.gram), form)


def reshaping() -> list[str]:
    """The names of all methods whose forms can compete."""
    from secateur.methods import method_classes

    return [
        n
        for n, kind in method_classes().items()
        if issubclass(kind, FormMethod) and kind is not Forms
    ]
