"""A result that is written and not yet evaluated, as a killed run leaves it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError

from secateur.evaluate.verify import ReferenceOutputs
from secateur.io.run_directory import WRITTEN, digest, write_whole
from secateur.io.schema import Record, read_record
from secateur.planning.plan import Plan
from secateur.report.run_records import Amount, Observed
from secateur.structure.selection import Selection
from secateur.utils.errors import InputError

MAX_BYTES = 2**30
SAID = "said.safetensors"


class Ending(Record):
    """What a run keeps of its work on weights, once that is done.

    Attributes:
        said: digest of the file in which it is what the result says.
    """

    plan: Plan
    observed: dict[str, Any]
    seconds: dict[str, Amount]
    said: str


@dataclass
class Finished:
    """A result that is written and not yet judged: its plan, what was seen, and what it says."""

    plan: Plan
    observed: dict[str, Any]
    seconds: dict[str, float]
    said: ReferenceOutputs

    def keep(self, folder: Path) -> None:
        """Note it in the run's folder."""
        self.said.save(folder / SAID)
        if self.plan.selected is not None:
            self.plan.selected.save(folder)
        ending = Ending(
            plan=self.plan,
            observed=self.observed,
            seconds=self.seconds,
            said=digest(folder / SAID),
        )
        write_whole(folder / WRITTEN, ending.model_dump_json())


def read_finished(folder: Path) -> Finished | None:
    """What an earlier run of the same command has noted, or None; what is damaged is forgotten."""
    if not (folder / WRITTEN).exists():
        return None
    try:
        found = read_record(Ending, folder / WRITTEN, "journal", MAX_BYTES)
        Observed.model_validate(found.observed)
        if digest(folder / SAID) == found.said:
            said, plan = ReferenceOutputs.load(folder / SAID), found.plan
            if plan.selection is not None:
                plan = plan.with_selection(Selection.load(folder, plan.selection))
            return Finished(plan, found.observed, found.seconds, said)
    except (InputError, ValidationError, SafetensorError, OSError):
        pass
    (folder / WRITTEN).unlink()
    return None
