"""Exports as stages, so that a recipe can hold them.

GGUF files and ONNX graphs are no checkpoints: no stage can go on from them and no run can measure
them, so they have functions alone.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from secateur.export.checkpoint import export_dense, export_plain
from secateur.models.model import Settings
from secateur.planning.stage import StageResult

if TYPE_CHECKING:
    from secateur.pipeline.context import RunContext


@dataclass(frozen=True)
class DenseExport:
    """:func:`~secateur.export.checkpoint.export_dense` as a stage."""

    settings: Settings = field(default_factory=Settings)
    name: ClassVar[str] = "export to dense"

    def as_dict(self) -> dict[str, Any]:
        """What is exported to, and how the checkpoint is opened."""
        return {"export": "dense", "settings": asdict(self.settings)}

    def run(self, source: str, out: Path, context: "RunContext") -> StageResult:
        """Multiply out every matrix of another form.

        Raises:
            InputError: none of the source's matrices has another form.
        """
        export_dense(source, out, self.settings, overwrite=True, progress=context.progress)
        return StageResult()


@dataclass(frozen=True)
class PlainExport:
    """:func:`~secateur.export.checkpoint.export_plain` as a stage."""

    settings: Settings = field(default_factory=Settings)
    name: ClassVar[str] = "export to plain"

    def as_dict(self) -> dict[str, Any]:
        """What is exported to, and how the checkpoint is opened."""
        return {"export": "plain", "settings": asdict(self.settings)}

    def run(self, source: str, out: Path, context: "RunContext") -> StageResult:
        """Write a checkpoint for classes of transformers itself.

        Raises:
            InputError: the source is plain already, or no stock class has its shapes.
        """
        export_plain(source, out, self.settings, overwrite=True, progress=context.progress)
        return StageResult()
