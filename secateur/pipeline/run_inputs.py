"""What a run reads and where it writes, checked before anything is measured."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import filelock
from pydantic import TypeAdapter, ValidationError

from secateur.data.tasks import use_of
from secateur.data.tokens import Calibration, Tokens, expanded
from secateur.evaluate.evaluator import Questions, Verdict, check_tasks, judge_apart
from secateur.evaluate.significance import doubts
from secateur.evaluate.task_file import is_file
from secateur.io.run_directory import Content, Workspace, digest, once
from secateur.io.schema import said
from secateur.models.loading import check_out, read_config
from secateur.models.model import Settings
from secateur.pipeline.input_checks import (
    default_texts,
    overlaps,
    read_calibration,
    stamps,
    unseen,
)
from secateur.report.report import versions
from secateur.report.run_records import Side
from secateur.utils.errors import InputError
from secateur.utils.progress import Progress


@dataclass(frozen=True)
class Task:
    """A model, the texts that decide and judge, and a place for the result.

    ``shared`` is a folder where runs that ask the same keep what was measured of the dense model.
    """

    source: str
    calibration: Calibration
    tokens: Tokens
    questions: Questions
    settings: Settings
    progress: Progress
    workspace: Workspace
    files: tuple[str, ...]
    shared: Path | None = None

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
        shared: Path | None = None,
    ) -> "Task":
        """A task whose defaults are filled in and whose input was looked at.

        Raises:
            InputError: anything wrong with it.
        """
        source, out = str(source), expanded(out)
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
        given = (source, calibration, tokens, questions, settings, progress)
        return cls(*given, Workspace(out, overwrite), files, shared)

    def fingerprint(self, **asked: Any) -> dict[str, Any]:
        """Everything that the result depends on, with what was asked for beside."""
        own = (self.workspace.folder, self.workspace.out)
        beside = () if self.shared is None else (self.shared.parent,)  # with the other runs
        return {
            "secateur": versions()["secateur"],
            "libraries": {k: v for k, v in versions().items() if k != "secateur"},
            "model": self.source,
            **asked,
            "calibration": self.calibration.as_dict(),
            "questions": asdict(self.questions),
            "settings": asdict(self.settings),
            "files": stamps([*self.files], (*own, *beside)),
        }

    @property
    def dense(self) -> Path:
        """The file in which the verdict on the dense model is kept."""
        if self.shared is None:
            return self.workspace.folder / "dense.json"
        asked = json.dumps(self.fingerprint(), sort_keys=True)
        return self.shared / f"dense-{hashlib.sha256(asked.encode()).hexdigest()[:24]}.json"

    @property
    def outputs(self) -> Path:
        """The file in which the dense model's outputs are kept."""
        return self.dense.with_suffix(".safetensors")

    def judge_dense(self) -> Verdict:
        """What is measured of the dense model, or was before the run was killed, or by another."""
        dense, outputs = self.dense, self.outputs

        def measured() -> Content:
            self.progress.say("measuring the dense model")
            outputs.unlink(missing_ok=True)  # of a run that was killed while it wrote them
            given = (self.source, self.questions, self.settings, self.progress)
            found = judge_apart(*given, outputs_of_dense=outputs, scratch=dense.parent)
            return {"verdict": asdict(found), "outputs": digest(outputs)}

        if self.shared is None:
            return once(dense, measured, self._verdict)
        self.shared.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(dense.with_suffix(".lock")):
            return once(dense, measured, self._verdict)

    def _verdict(self, found: Content) -> Verdict:
        """What was kept of the dense model.

        Raises:
            InputError: it is damaged, or is no answer to the questions.
        """
        named = f"stage {str(self.dense)!r}"
        try:
            text = json.dumps(found.get("verdict"))
            verdict = TypeAdapter(Verdict).validate_json(text, strict=True)
            Side.model_validate(found["verdict"])
            doubts({"dense": verdict.task_scores}, {})
        except ValidationError as error:
            raise InputError(f"{named}: {said(error)}.") from error
        except (KeyError, TypeError) as error:
            raise InputError(f"{named}: a task has no figure {error}.") from error
        names = {text.name for text in self.questions.texts}
        if any({*own} != names for own in (verdict.perplexity, verdict.tokens, verdict.texts)):
            raise InputError(f"{named}: it is of other texts.")
        if digest(self.outputs) != found.get("outputs"):
            raise InputError(f"{named}: {self.outputs.name} is damaged.")
        return verdict
