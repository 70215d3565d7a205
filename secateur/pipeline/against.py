"""Two models held against each other: the same questions, each in a process of its own."""

import tempfile
from dataclasses import asdict, replace
from pathlib import Path

from secateur.evaluate.damage.domains import domains
from secateur.evaluate.evaluator import measure_in_subprocess
from secateur.evaluate.measurements import Questions
from secateur.evaluate.significance import doubts
from secateur.models.model import Settings
from secateur.report.report import Report
from secateur.utils.progress import Progress
from secateur.utils.run_info import versions


def compare_models(
    source: str, dense: str, questions: Questions, settings: Settings, progress: Progress
) -> Report:
    """What `compress` would say of its two models, of any two that read alike.

    ``source`` is called compressed in the result, whatever it is.

    Raises:
        InputError: one of them is unusable, or they read the text unlike.
    """
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder, "dense.safetensors")
        progress.say(f"measuring {dense}")
        own = replace(settings, revision=None)  # which is that of the other
        before = measure_in_subprocess(dense, questions, own, progress, outputs_of_dense=kept)
        progress.say(f"measuring {source}")
        after = measure_in_subprocess(source, questions, settings, progress, outputs_of_dense=kept)
    scores = {"dense": before.task_scores, "compressed": after.task_scores}
    return Report(
        {
            "model": {"source": source, "against": dense},
            "dense": asdict(before),
            "compressed": asdict(after),
            "domains": domains(before.perplexity, after.perplexity),
            "doubts": doubts(scores, after.task_changes),
            "versions": versions(),
        }
    )
