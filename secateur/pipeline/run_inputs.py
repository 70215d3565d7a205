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
from secateur.evaluate.evaluator import check_tasks, measure_in_subprocess
from secateur.evaluate.measurements import Measurements, Questions
from secateur.evaluate.significance import doubts
from secateur.evaluate.task_file import is_file
from secateur.io.run_directory import Content, Workspace, digest, once
from secateur.io.schema import said
from secateur.models.loading import check_out, read_config
from secateur.models.model import Settings
from secateur.pipeline.config import RunConfig
from secateur.pipeline.context import RunContext
from secateur.pipeline.input_checks import (
    default_texts,
    overlaps,
    read_calibration,
    stamps,
    unseen,
)
from secateur.report.run_records import Side
from secateur.utils.errors import InputError
from secateur.utils.run_info import versions


@dataclass(frozen=True)
class Inputs:
    """A model and the calibration data that it is measured on.

    Attributes:
        tokens: the windows that ``calibration`` describes, for this model.
    """

    source: str
    calibration: Calibration
    tokens: Tokens
    settings: Settings

    @classmethod
    def of(cls, source: str, calibration: Calibration, settings: Settings) -> "Inputs":
        """The inputs with their tokens read.

        Raises:
            InputError: the model or its family is unknown, or the text does not do.
        """
        return cls(source, calibration, read_calibration(source, calibration, settings), settings)


@dataclass(frozen=True)
class RunInputs:
    """What a run reads and where it writes, with every default filled in.

    Attributes:
        model: the model and its calibration data.
        questions: what is measured of the dense model and of the result.
        workspace: where the run works and its result appears.
        files: names of all that is read.
        context: who is told, and what is shared with other runs.
    """

    model: Inputs
    questions: Questions
    workspace: Workspace
    files: tuple[str, ...]
    context: RunContext

    @classmethod
    def of(cls, config: RunConfig, context: RunContext) -> "RunInputs":
        """The inputs of a run, whose defaults are filled in and whose texts were looked at.

        Raises:
            InputError: anything wrong with them.
        """
        source, out, settings = str(config.source), expanded(config.out), config.settings
        calibration = config.calibration or Calibration()
        use = use_of(read_config(source, settings))
        own = default_texts(calibration, use)
        questions = config.questions or Questions(own, length=calibration.length)
        questions = replace(questions, texts=unseen(questions.texts, calibration))
        check_tasks(use, questions.tasks)
        asked = filter(is_file, questions.tasks)
        files = (source, calibration.source, *(text.source for text in questions.texts), *asked)
        check_out(out, [*files])
        model = Inputs.of(source, calibration, settings)
        for text in questions.texts:
            use.check(text.source)
        for note in overlaps(questions.texts, calibration):
            context.progress.say(f"note: {note}")
        return cls(model, questions, Workspace(out, config.overwrite), files, context)

    @property
    def source(self) -> str:
        """The model."""
        return self.model.source

    @property
    def settings(self) -> Settings:
        """How it is opened."""
        return self.model.settings

    def fingerprint(self, **asked: Any) -> dict[str, Any]:
        """Everything that the result depends on, with what was asked for beside."""
        own, shared = (self.workspace.folder, self.workspace.out), self.context.shared
        beside = () if shared is None else (shared.parent,)  # with the other runs
        return {
            "secateur": versions()["secateur"],
            "libraries": {k: v for k, v in versions().items() if k != "secateur"},
            "model": self.source,
            **asked,
            "calibration": self.model.calibration.as_dict(),
            "questions": asdict(self.questions),
            "settings": asdict(self.settings),
            "files": stamps([*self.files], (*own, *beside)),
        }

    @property
    def dense(self) -> Path:
        """The file in which the measurements of the dense model are kept."""
        if self.context.shared is None:
            return self.workspace.folder / "dense.json"
        asked = json.dumps(self.fingerprint(), sort_keys=True)
        name = f"dense-{hashlib.sha256(asked.encode()).hexdigest()[:24]}.json"
        return self.context.shared / name

    @property
    def outputs(self) -> Path:
        """The file in which the dense model's outputs are kept."""
        return self.dense.with_suffix(".safetensors")

    def judge_dense(self) -> Measurements:
        """What is measured of the dense model, or was before the run was killed, or by another."""
        dense, outputs = self.dense, self.outputs

        def measured() -> Content:
            self.context.progress.say("measuring the dense model")
            outputs.unlink(missing_ok=True)  # of a run that was killed while it wrote them
            given = (self.source, self.questions, self.settings, self.context.progress)
            found = measure_in_subprocess(*given, outputs_of_dense=outputs, scratch=dense.parent)
            return {"measurements": asdict(found), "outputs": digest(outputs)}

        if self.context.shared is None:
            return once(dense, measured, self._kept_measurements)
        self.context.shared.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(dense.with_suffix(".lock")):
            return once(dense, measured, self._kept_measurements)

    def _kept_measurements(self, found: Content) -> Measurements:
        """What was kept of the dense model.

        Raises:
            InputError: it is damaged, or is no answer to the questions.
        """
        named = f"stage {str(self.dense)!r}"
        try:
            text = json.dumps(found.get("measurements"))
            measurements = TypeAdapter(Measurements).validate_json(text, strict=True)
            Side.model_validate(found["measurements"])
            doubts({"dense": measurements.task_scores}, {})
        except ValidationError as error:
            raise InputError(f"{named}: {said(error)}.") from error
        except (KeyError, TypeError) as error:
            raise InputError(f"{named}: a task has no figure {error}.") from error
        names = {text.name for text in self.questions.texts}
        if any(
            {*own} != names
            for own in (measurements.perplexity, measurements.tokens, measurements.texts)
        ):
            raise InputError(f"{named}: it is of other texts.")
        if digest(self.outputs) != found.get("outputs"):
            raise InputError(f"{named}: {self.outputs.name} is damaged.")
        return measurements
