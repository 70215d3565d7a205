"""Methods that give the matrices of linear layers another form, and the metric they share."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from secateur.allocate.base import Allocator
from secateur.allocate.uniform import Uniform
from secateur.calibration.needs import INPUTS, BlockStatistics, Need
from secateur.calibration.statistics import Gram
from secateur.layers.forms_secateur import fill
from secateur.methods.base import Method, Solution
from secateur.models.block import Block, Linear
from secateur.models.linear_ops import dense_weight, inputs_by_outputs
from secateur.structure.budget import Keep, Target
from secateur.structure.error_curve import Curve
from secateur.structure.form import Form
from secateur.structure.narrowing import Narrowing
from secateur.structure.parametrizations import smaller
from secateur.structure.units import MATRICES, Matrix, Unit

if TYPE_CHECKING:
    from secateur.models.model import Model


class Metric:
    """Squared output error of a change Δ of a weight (outputs, inputs): tr(Δ H Δᵀ), H = E xxᵀ.

    H is a mean over tokens in float64; the identity where a method looks at the weights alone.
    ``ridge``, relative to the mean of H's diagonal, is added where a root or an inverse is taken.
    """

    def __init__(self, gram: Tensor, ridge: float = 0.0) -> None:
        self.gram = gram
        self.ridge = ridge

    @classmethod
    def identity(cls, inputs: int, like: Tensor) -> "Metric":
        """That of inputs which are equally large and have nothing to do with each other."""
        return cls(torch.eye(inputs, dtype=torch.float64, device=like.device))

    def error(self, difference: Tensor) -> float:
        """The mean squared error of the outputs that a difference of weights makes."""
        return float(torch.einsum("oi,ij,oj->", difference, self.gram, difference).clamp_min(0.0))

    @property
    def energy(self) -> Tensor:
        """Mean square of every input, (inputs): the diagonal of H."""
        return self.gram.diagonal()

    @cached_property
    def damped(self) -> Tensor:
        """H with the ridge on its diagonal."""
        mean = self.energy.mean()
        scale = torch.where(mean > 0, mean, 1.0)  # where nothing is read, any metric does
        return self.gram + self.ridge * scale * torch.eye(len(self.gram)).to(self.gram)

    @cached_property
    def whitening(self) -> tuple[Tensor, Tensor]:
        """L with L Lᵀ = H and its pseudo-inverse, both (inputs, inputs).

        By an eigendecomposition, as H may be singular; eigenvalues are raised by the ridge, and
        directions without energy, which only a ridge of zero leaves, have none in either.
        """
        values, vectors = torch.linalg.eigh(self.damped)
        floor = torch.finfo(values.dtype).eps * len(values) * values[-1]
        there = (values > floor).to(values)
        root = values.clamp_min(0).sqrt() * there
        inverse = there / torch.where(there > 0, root, 1.0)
        return vectors * root, (vectors * inverse).mT


@dataclass(frozen=True)
class FormMethod(Method):
    """Stores the weights of linear layers in another form without changing any width.

    A subclass says which :meth:`forms` it has for a matrix, and works out the tensors of one of
    them in :meth:`reshaped`. A weight is W (outputs, inputs), in float64, and its error is that of
    the outputs, ‖(W − Ŵ)L‖² with L Lᵀ = H. Don't use one where width can go: a narrower module is
    faster on any hardware and needs no code of ours.
    """

    kinds: ClassVar[tuple[str, ...]] = MATRICES
    target: ClassVar[Target] = "bytes"
    usual_keep: ClassVar[Keep] = "least"
    #: whether it looks at what the layers read; a method that doesn't has the identity for a metric
    data_aware: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[Need]:
        """The Gram of what every linear layer reads."""
        return INPUTS if self.data_aware else frozenset()

    @property
    def allocator(self) -> Allocator:
        """The same share of every matrix."""
        return Uniform()

    @classmethod
    def among_others(cls) -> "FormMethod":
        """The method as it offers its forms beside those of others: at several sizes each."""
        return cls()

    @abstractmethod
    def forms(self, outputs: int, inputs: int, bias: bool) -> Sequence[Form]:
        """What it may make of a matrix; what is no smaller than the dense weight is left out."""

    def together(self, block: Block) -> list[list[Linear]]:
        """The linear layers of a block, those together that share a form; here each by itself."""
        return [[linear] for linear in block.linear_layers]

    def offered(self, group: Sequence[Linear], model: "Model") -> Sequence[Form]:
        """The forms for linear layers of a model, of whose matrix nothing else is asked here."""
        outputs, inputs = stacked(group).shape
        return self.forms(outputs, inputs, any(isinstance(x.module.bias, Tensor) for x in group))

    @abstractmethod
    def reshaped(self, weight: Tensor, metric: Metric, form: Form) -> dict[str, Tensor]:
        """The tensors of a form for a weight (outputs, inputs), as its layer names them."""

    def layer(
        self, weight: Tensor, metric: Metric, form: Form, bias: Tensor | None, dtype: torch.dtype
    ) -> nn.Module:
        """The layer that a form makes of a weight."""
        spec = {**form.spec, "bias": bias is not None}
        return fill(spec, self.reshaped(weight, metric, form), bias, dtype)

    def replacing(
        self, group: Sequence[Linear], weight: Tensor, metric: Metric, form: Form
    ) -> dict[str, nn.Module]:
        """The layers that a form makes of a group's weight (outputs, inputs), by their paths."""
        (linear,) = group
        module = linear.module
        bias = module.bias if isinstance(module.bias, Tensor) else None
        dtype = inputs_by_outputs(module).dtype
        return {linear.path: self.layer(weight, metric, form, bias, dtype)}

    def errors(
        self, weight: Tensor, metric: Metric, forms: Sequence[Form], judged: Metric | None = None
    ) -> list[float]:
        """The output error of every form; here by making each of them in float64.

        ``judged`` is the metric of that error, where it isn't the one by which forms are made.
        """
        found = []
        for form in forms:
            layer = self.layer(weight, metric, form, None, torch.float64)
            found.append((judged or metric).error(weight - dense_weight(layer)))
        return found

    def units(self, model: "Model", multiple_of: int) -> list[Unit]:
        """The matrices of all linear layers in blocks."""
        return [
            self._unit(block, group, model)
            for block in model.blocks
            for group in self.together(block)
        ]

    def _unit(self, block: Block, group: Sequence[Linear], model: "Model") -> Matrix:
        outputs, inputs = stacked(group).shape
        offered = self.offered(group, model)
        if any(linear.factor for linear in group):  # no factor is made of factors
            offered = [form for form in offered if form.stock]
        names = [group[0].path, *(linear.path.rpartition(".")[2] for linear in group[1:])]
        forms = smaller(offered, outputs, inputs, model.stored.itemsize)
        return Matrix(
            name=f"layers.{block.index}.{'+'.join(names)}",
            block=block.index,
            size=len(forms) + 1,
            step=1,
            hidden=block.hidden,
            least=1,
            stack=block.anatomy.blocks,
            paths=tuple(linear.path for linear in group),
            order=min(linear.order for linear in group),
            outputs=outputs,
            inputs=inputs,
            forms=forms,
            published=all(linear.published for linear in group) and not model.narrowed,
            itemsize=model.stored.itemsize,
        )

    def obstacle(self, model: "Model") -> str | None:
        """None of its matrices has a smaller form."""
        if any(not unit.fixed for unit in self.units(model, 1)):
            return None
        return f"none of its matrices becomes smaller by the forms of {self.name}"

    def metric(self, linear: Linear, statistics: BlockStatistics) -> Metric:
        """What an error of a linear's weight does to its outputs.

        What a second factor reads is x Aᵀ, so its Gram is A H Aᵀ: nothing has to be observed.
        """
        weight = inputs_by_outputs(linear.module)
        if not self.data_aware:  # there are no statistics
            return self.seen(weight)
        gram = statistics[Need(linear.site, Gram)].mean
        if linear.behind is not None:
            first = inputs_by_outputs(linear.behind).double().t()
            gram = first @ gram @ first.t()
        return self.seen(gram)

    def seen(self, gram: Tensor) -> Metric:
        """The metric of a Gram as this method sees it: with its ridge, or all inputs alike.

        Where it looks at the weights alone, anything of that length will do.
        """
        if not self.data_aware:
            return Metric.identity(len(gram), gram)
        return Metric(gram, getattr(self, "ridge", 0.0))

    def solve(self, unit: Unit, block: Block, statistics: BlockStatistics) -> Solution:
        """Every form of one matrix."""
        assert isinstance(unit, Matrix)
        group = [layer for layer in block.linear_layers if layer.path in unit.paths]
        metric, weight = self.metric(group[0], statistics), stacked(group).double()

        def curve() -> Curve:
            errors = self.errors(weight, metric, unit.forms)
            whole = metric.error(weight)
            return Curve.of(torch.tensor([whole, *errors, 0.0], dtype=torch.float64))

        def at(size: int) -> Narrowing:
            form = unit.at(size)
            assert form is not None
            return Narrowing(layers=self.replacing(group, weight, metric, form))

        return Solution(curve, at)


def stacked(group: Sequence[Linear]) -> Tensor:
    """The weights of linear layers that read the same, one below the other, (outputs, inputs)."""
    weights = [inputs_by_outputs(linear.module).t() for linear in group]
    return weights[0] if len(weights) == 1 else torch.cat(weights)
