"""A stage: whatever makes one checkpoint of another."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from secateur.planning.plan import Plan

if TYPE_CHECKING:
    from secateur.evaluate.verify import ReferenceOutputs
    from secateur.pipeline.context import RunContext


@dataclass
class StageResult:
    """What a stage says of the checkpoint that it has written.

    Attributes:
        plan: the sizes of all units, where the stage decided them.
        observed: what compressing has shown of the blocks, as a report has it.
        said: outputs of the model in memory, which the reloaded checkpoint must repeat; None where
            the stage has compared them itself.
    """

    plan: Plan | None = None
    observed: dict[str, Any] = field(default_factory=dict)
    said: "ReferenceOutputs | None" = None


class Stage(Protocol):
    """Reads the checkpoint ``source`` and writes another one to the new folder ``out``.

    Compressing and exporting are stages, and so are the steps of a recipe when they run. A class
    needs these three members and no base class. Of several ranks, all run a stage that compresses,
    and the leader alone runs any other.
    """

    @property
    def name(self) -> str:
        """What progress, plans and reports call it."""

    def as_dict(self) -> dict[str, Any]:
        """All that its result depends on, beside its source, as plain data."""

    def run(self, source: str, out: Path, context: "RunContext") -> StageResult:
        """Do it. ``out`` may be missing or an empty folder, and holds a checkpoint afterwards.

        Raises:
            InputError: the source is not what the stage can work on.
        """
