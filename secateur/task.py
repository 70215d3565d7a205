"""What a run reads and where it writes, checked before anything is measured."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from secateur.errors import InputError
from secateur.evaluate.judge import Questions, Verdict, check_tasks, judge_apart
from secateur.evaluate.tasks import is_file
from secateur.inputs import (
    check_out,
    default_texts,
    overlaps,
    read_calibration,
    stamps,
    unseen,
)
from secateur.model import Settings
from secateur.opening import read_config
from secateur.progress import Progress
from secateur.records import said
from secateur.report import versions
from secateur.text import Calibration, Tokens
from secateur.uses import use_of
from secateur.workspace import AGAIN, Workspace


@dataclass(frozen=True)
class Task:
    """A model, the texts that decide and judge, and a place for the result."""

    source: str
    calibration: Calibration
    tokens: Tokens
    questions: Questions
    settings: Settings
    progress: Progress
    workspace: Workspace
    files: tuple[str, ...]

    @classmethod
    def of(
        cls,
        source: str | Path,
        out: str | Path,
        calibration: Calibration | None,
        questions: Questions | None,
        settings: Settings,
        progress: Progress,
        overwrite: bool,
    ) -> "Task":
        """A task whose defaults are filled in and whose input was looked at.

        Raises:
            InputError: anything wrong with it.
        """
        source, out = str(source), Path(out).expanduser()
        calibration = calibration or Calibration()
        use = use_of(read_config(source, settings))
        own = default_texts(calibration, use)
        questions = questions or Questions(own, length=calibration.length)
        questions = replace(questions, texts=unseen(questions.texts, calibration))
        check_tasks(use, questions.tasks)
        asked = filter(is_file, questions.tasks)
        files = (source, calibration.source, *(text.source for text in questions.texts), *asked)
        check_out(out, [*files])
        tokens = read_calibration(source, calibration, settings)
        for text in questions.texts:
            use.check(text.source)
        for note in overlaps(questions.texts, calibration):
            progress.say(f"note: {note}")
        workspace = Workspace(out, overwrite)
        return cls(source, calibration, tokens, questions, settings, progress, workspace, files)

    def fingerprint(self, **asked: Any) -> dict[str, Any]:
        """Everything that the result depends on, with what was asked for beside."""
        return {
            "secateur": versions()["secateur"],
            "model": self.source,
            **asked,
            "calibration": self.calibration.as_dict(),
            "questions": asdict(self.questions),
            "settings": asdict(self.settings),
            "files": stamps([*self.files], (self.workspace.folder, self.workspace.out)),
        }

    @property
    def outputs(self) -> Path:
        """The file in which the dense model's outputs are kept."""
        return self.workspace.folder / "dense.safetensors"

    def judge_dense(self) -> Verdict:
        """What is measured of the dense model, or was before the run was killed."""

        def measured() -> dict[str, Any]:
            self.progress.say("measuring the dense model")
            self.outputs.unlink(missing_ok=True)  # of a run that was killed while it wrote them
            given = (self.source, self.questions, self.settings, self.progress)
            return asdict(
                judge_apart(*given, outputs_of_dense=self.outputs, scratch=self.workspace.folder)
            )

        found = self.workspace.stage("dense", measured)
        try:
            TypeAdapter(Verdict).validate_python(found)
        except ValidationError as error:
            raise InputError(
                f"stage {str(self.workspace.folder / 'dense.json')!r}: {said(error)}.{AGAIN}"
            ) from error
        return Verdict(**found)
