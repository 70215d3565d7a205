"""What a run of the tests has met: methods, families, tiers and commands that did their work."""

from typing import get_args

from secateur.cli.main import cli
from secateur.families import FAMILIES
from secateur.methods import METHODS
from secateur.models.model import Model
from secateur.planning.plan import Plan
from secateur.structure.budget import Written

Met = set[tuple[str, str]]

#: of this process
MET: Met = set()


def note_written(model: Model, plan: Plan) -> None:
    """Note what wrote a checkpoint, and of what."""
    MET.update((("method", plan.method.name), ("tier", plan.tier)))
    note_family(model)


def note_family(model: Model) -> None:
    """Note that a model of this family was opened and computed."""
    if model.anatomy is not None:
        number = FAMILIES.index(model.anatomy)
        MET.add(("family", named(number, model.module.config.model_type)))


def note_command(name: str) -> None:
    """Note a command that succeeded."""
    MET.add(("command", name))


def named(number: int, model_type: str) -> str:
    """Two families may serve one model type, and one family several."""
    return f"{model_type} (number {number} of FAMILIES)"


def unmet(met: Met) -> list[str]:
    """What a whole run has to meet, and this one did not."""
    asked = {("method", name) for name in METHODS}
    for number, family in enumerate(FAMILIES):
        asked |= {("family", named(number, name)) for name in family.model_types}
    asked |= {("tier", tier) for tier in get_args(Written)}
    asked |= {("command", name) for name in cli.commands}
    return [f"{kind} {name}" for kind, name in sorted(asked - met)]
