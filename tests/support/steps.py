"""A method with its budget, and what a plan needs before a weight changes."""

from secateur import Budget, Step
from secateur.pipeline.prepare import Prepared


def step_of(method, keep=None, allocator=None, **budget):
    """A step with nothing left open; ``budget`` are the other fields of its budget."""
    return Step.of(method, Budget(keep=keep, **budget), allocator).filled


def prepared_of(model, data, plan, method=None, evidence=None):
    """A model with a plan, and the tokens and the store of ``data``."""
    method = method or plan.build_method()
    step = Step(method, plan.asked_budget, method.allocator)
    units = step.units(model)
    return Prepared(model, data.tokens, data.store, step, plan, units=units, evidence=evidence)
