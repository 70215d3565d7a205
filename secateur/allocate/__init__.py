"""Budgets over units; one strategy, one file. Names serve the command line and plans."""

from importlib import import_module

from secateur.allocate.base import Allocator
from secateur.errors import InputError, nearest

#: name → "module:class". Imported only when asked for.
ALLOCATORS = {
    "uniform": "secateur.allocate.uniform:Uniform",
    "influence": "secateur.allocate.influence:EntropicInfluence",
    "knapsack": "secateur.allocate.knapsack:Knapsack",
    "plain": "secateur.allocate.plain:PlainWidth",
}


def allocator_class(name: str) -> type[Allocator]:
    """The allocator class of a name.

    Raises:
        InputError: no allocator has it.
    """
    if name not in ALLOCATORS:
        raise InputError(f"unknown allocator {name!r}. {nearest(name, ALLOCATORS)}")
    module, attribute = ALLOCATORS[name].split(":")
    found: type[Allocator] = getattr(import_module(module), attribute)
    return found
