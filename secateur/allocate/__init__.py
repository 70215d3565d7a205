"""How a budget is spent over the units; one strategy, one file.

Names serve the command line and plans; in Python, pass the object. May import the rooms from
``utils`` to ``calibration``.
"""

from secateur.allocate.base import Allocator
from secateur.utils.registry import Registry

#: name → "module:class" of the project's own. Imported only when asked for.
ALLOCATORS = {
    "uniform": "secateur.allocate.uniform:Uniform",
    "influence": "secateur.allocate.influence:EntropicInfluence",
    "knapsack": "secateur.allocate.knapsack:Knapsack",
    "fluctuation": "secateur.allocate.fluctuation:Fluctuation",
    "angular": "secateur.allocate.angular:Angular",
    "alpha": "secateur.allocate.alpha:AlphaPruning",
    "farms": "secateur.allocate.farms:FARMS",
    "welore": "secateur.allocate.welore:WeLore",
    "middle": "secateur.allocate.middle:Middle",
    "nirvana": "secateur.allocate.nirvana:TwoThresholds",
    "greedy": "secateur.allocate.greedy:Greedy",
    "least-error": "secateur.allocate.least_error:LeastError",
    "spdy": "secateur.allocate.spdy:SPDY",
    "plain": "secateur.allocate.plain:PlainWidth",
}


REGISTRY = Registry("allocator", "secateur.allocators", ALLOCATORS, Allocator)


def allocator_class(name: str, package: str | None = None) -> type[Allocator]:
    """The allocator class of a name; ``package`` is what a plan says that declares it.

    Raises:
        InputError: no package here declares the name, several do, or its class can't be used.
    """
    found: type[Allocator] = REGISTRY.get(name, package)
    return found
