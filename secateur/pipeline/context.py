"""What a run carries while it goes."""

from dataclasses import dataclass, field
from pathlib import Path

from secateur.distributed.collectives import ALONE, Ranks
from secateur.io.run_directory import Workspace
from secateur.utils.progress import Progress
from secateur.utils.stopwatch import Stopwatch


@dataclass(frozen=True)
class RunContext:
    """Who is told, who helps and where a run works; nothing in it changes the result.

    Attributes:
        progress: who is told how far it is, by the leader alone; by default nobody.
        ranks: the processes that run the same program; by default this one.
        command: the command line that asked for the run; None where Python did.
        shared: folder in which runs that measure the same dense model keep what is measured of it;
            by default every run measures it.
        watch: seconds that the parts of the run take; every run starts its own.
        directory: where the run works, once it has taken its folder.
    """

    progress: Progress = field(default_factory=Progress)
    ranks: Ranks = ALONE
    command: str | None = None
    shared: Path | None = None
    watch: Stopwatch = field(default_factory=Stopwatch)
    directory: Workspace | None = None

    def __post_init__(self) -> None:
        if not self.ranks.leader:
            object.__setattr__(self, "progress", Progress())
