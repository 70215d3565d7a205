"""Names of runs: the method, the keep, and what else distinguishes a run."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from secateur.planning.recipe import Recipe
from secateur.report.frontier_table import SHEETS
from secateur.sweeps.order import in_steps
from secateur.utils.errors import InputError

LONGEST = 100
#: what is so common that its value says enough
BARE = {"method", "allocator", "target", "tier", "runtime"}


@dataclass(frozen=True)
class Asked:
    """A run that has no name yet.

    Attributes:
        base: how its name begins.
        recipe: its steps; of a method alone one, which has the keep.
        keep: what its name says of that.
    """

    base: str
    recipe: Recipe
    keep: float | None


def named(found: Sequence[Asked]) -> dict[str, Recipe]:
    """All runs with names that are safe for folders; duplicates appear once.

    Raises:
        InputError: two that differ have one name, or a name is too long.
    """
    runs = list(dict.fromkeys(found))
    facts = [_facts(run.recipe) for run in runs]
    seen: dict[Any, set[str]] = {}
    for run, own in zip(runs, facts, strict=True):
        for key, value in own.items():
            seen.setdefault((run.base, key), set()).add(repr(value))
    made: dict[str, Recipe] = {}
    taken = {name.casefold() for name in SHEETS}
    for run, own in zip(runs, facts, strict=True):
        parts = [run.base, *([] if run.keep is None else [f"{run.keep:.12g}"])]
        for key, value in own.items():
            if len(seen[run.base, key]) > 1:
                bare = key[-1] in BARE and "option" not in key
                parts.append(str(value) if bare else f"{key[-1]}-{value}")
        name = re.sub(r"[^A-Za-z0-9.+-]+", "-", "-".join(parts))
        name = re.sub(r"-{2,}", "-", name).strip("-.")
        if not name or len(name) > LONGEST:
            raise InputError(f"sweep: {name!r} is no name for a folder; give these runs a `name`.")
        if name.casefold() in taken:
            raise InputError(f"sweep: the name {name!r} is taken; give one of the two a `name`.")
        taken.add(name.casefold())
        made[name] = run.recipe
    return made


def _facts(recipe: Recipe) -> dict[tuple[str, ...], Any]:
    """What can distinguish runs with the same method.

    Options of an allocator are compared between runs with the same allocator.
    """
    if in_steps(recipe):
        return {}
    content = recipe.steps[0].as_dict()
    method, allocator = content.pop("method"), content["allocator"]
    found: dict[tuple[str, ...], Any] = {("method",): method}
    spends = content.pop("allocator_options")
    found |= {(method, "option", k): v for k, v in content.pop("options").items()}
    found |= {(method, k): v for k, v in content.items() if k != "keep"}
    return found | {(method, allocator, "option", k): v for k, v in spends.items()}
