"""Which tests the fast run takes of those that differ in their parameters alone.

It takes so many of each test function that every value of every parameter is met at least once:
32 tests, not 800, for each method on each family. The others are marked slow; ``make test-all``
runs them all.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import pytest

Row = Mapping[str, Hashable]
#: what a test costs the fast run, beside those that differ in parameters alone; 0 without it
COST = pytest.StashKey[int]()


def covering(rows: Sequence[Row], costs: Sequence[int]) -> list[int]:
    """Choose few rows that together have every value that each parameter has in any of them.

    The choice is greedy and depends on nothing but the arguments: rows of lower costs come first,
    and among these the one that adds most values, and among equals the first.

    Args:
        rows: for each test, parameter to its value.
        costs: of each test; a costlier one is taken only for a value that no cheaper one has.

    Returns:
        the indices of the chosen rows, in the order of the choice.
    """
    own = [frozenset(row.items()) for row in rows]
    missing = set().union(*own)
    chosen: list[int] = []
    for cost in sorted(set(costs)):
        waiting = [index for index, asked in enumerate(costs) if asked == cost]
        while waiting:
            best = max(waiting, key=lambda index: len(own[index] & missing))
            if not own[best] & missing:
                break
            chosen.append(best)
            missing -= own[best]
    return chosen


def parameters(item: pytest.Item) -> dict[str, Any]:
    """Parameter to value of a test; none for a test without parameters."""
    found: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
    return found


def values(item: pytest.Item) -> Row:
    """Parameter to what stands for its value; names that one ``parametrize`` gives together are one
    parameter, so that no case of such a list is left out."""
    own = {name: id(value) for name, value in parameters(item).items()}
    row: dict[str, Hashable] = {}
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0] if mark.args else mark.kwargs["argnames"]
        names = names.split(",") if isinstance(names, str) else names
        row[str(names)] = tuple(own.pop(name.strip()) for name in names)
    return row | own


def thin(items: Iterable[pytest.Item]) -> None:
    """Mark as slow those tests that the fast run can do without."""
    functions: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if hasattr(item, "callspec") and item.get_closest_marker("slow") is None:
            functions[item.nodeid.partition("[")[0]].append(item)
    for own in functions.values():
        costs = [item.stash.get(COST, 0) for item in own]
        chosen = set(covering([values(item) for item in own], costs))
        for index, item in enumerate(own):
            if index not in chosen:
                item.add_marker(pytest.mark.slow)
