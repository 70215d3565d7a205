"""Tasks of lm-evaluation-harness (extra ``eval``), on an open model."""

import contextlib
import copy
import difflib
import io
import logging
import math
import sys
from collections.abc import Iterator
from typing import Any

import torch

from secateur.evaluate.significance import Answers, Figures, points
from secateur.models.model import Model
from secateur.utils.errors import InputError
from secateur.utils.progress import Advance, Progress

SEED = 1234  # the harness's own, for the choice of examples in the prompt
#: shown where the harness has several metrics of a task, in this order before any other
METRICS = ("acc", "acc_norm", "exact_match")
CHOICES = "choices of secateur"  # key of their number beside what the harness keeps of an item


def load(names: list[str]) -> dict[str, dict[str, Any]]:
    """The tasks of each name, with items from the hub or its cache.

    Raises:
        InputError: the harness is missing, does not know a name, or cannot get the items.
    """
    if not names:
        return {}
    try:
        import accelerate  # noqa: F401  (the harness opens models with it)
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(
            f'task {names[0]!r} is one of lm-evaluation-harness: pip install "secateur[eval]"; or '
            f"give a task file, a .jsonl."
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with _silence():
        manager = TaskManager()
    for name in names:
        if name not in (known := manager.all_tasks):
            near = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
            hint = f"The nearest of its {len(known)}: {', '.join(near)}. " if near else ""
            raise InputError(
                f"unknown task {name!r}: lm-evaluation-harness has none of that name, and there is "
                f"no such file. {hint}`lm-eval ls tasks` lists them."
            )
    return {name: _loaded(manager, name) for name in names}


def _loaded(manager: Any, name: str) -> dict[str, Any]:
    from huggingface_hub.errors import HfHubHTTPError

    try:
        with _silence():
            found: dict[str, Any] = manager.load([name])
    except (OSError, ValueError, RuntimeError, ImportError, HfHubHTTPError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"task {name!r}: its items cannot be had ({reason[0]}). They come from the hub, once; "
            f"check the network, or give a task file, a .jsonl, which needs none."
        ) from error
    for task in found["tasks"].values():
        if task.get_config("output_type") == "loglikelihood_rolling":
            raise InputError(f"task {name!r} is a perplexity; give its text to --eval.")
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEED)
    return found


def _watched(name: str, progress: Progress) -> Any:
    """The harness's model class, with our progress display."""
    from lm_eval.models.huggingface import HFLM

    terminal = sys.stderr

    @contextlib.contextmanager
    def shown(total: int) -> Iterator[Advance]:
        """Show a stage for the harness, whose own bars are hidden."""
        with (
            contextlib.redirect_stderr(terminal),
            progress.stage(f"task: {name}"[:28], total) as advance,
            _silence(),
        ):
            yield advance

    class Watched(HFLM):  # type: ignore[misc]
        """The harness's model class, which reports its progress."""

        advance: Advance = staticmethod(lambda _: None)
        written: Advance = staticmethod(lambda _: None)

        def _loglikelihood_tokens(self, requests: Any, *_: Any, **options: Any) -> Any:
            with shown(len(requests)) as self.advance:
                return super()._loglikelihood_tokens(requests, **options | {"disable_tqdm": True})

        def generate_until(self, requests: Any, *_: Any, **__: Any) -> Any:
            with shown(len(requests)) as self.written:
                return super().generate_until(requests, disable_tqdm=True)

        def _model_generate(self, context: Any, *given: Any, **options: Any) -> Any:
            out = super()._model_generate(context, *given, **options)
            self.written(len(context))
            return out

        def _model_call(self, inps: Any, *given: Any, **options: Any) -> Any:
            out = super()._model_call(inps, *given, **options)
            self.advance(len(inps))
            return out

    return Watched


def judged(
    model: Model, loaded: dict[str, Any], name: str, limit: int | None, progress: Progress
) -> dict[str, tuple[Figures, Answers]]:
    """The harness's figures of a model on the tasks of a name, and its answers to each item.

    A group whose score is the mean over all items of its tasks is one entry. For other groups, each
    task is an entry. Standard errors follow the harness's formula, over all items.

    Raises:
        InputError: a task can't be run on such a model.
    """
    from lm_eval.evaluator import evaluate

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with _silence():
        reader = _watched(name, progress)(
            pretrained=model.module,
            tokenizer=copy.deepcopy(model.tokenizer),  # which gets a token to pad with
            batch_size=8,
            softmax_dtype="float32",
        )
        try:
            found = evaluate(lm=reader, task_dict=loaded, limit=limit, bootstrap_iters=0)
        except (ValueError, NotImplementedError, ImportError) as error:
            raise InputError(f"task {name!r} cannot be run: {str(error).strip()}") from error
    tasks: dict[str, list[dict[str, Any]]] = found["samples"]
    for own, samples in tasks.items():
        for sample in samples:
            sample[CHOICES] = _choices(loaded["tasks"].get(own), sample["doc"])
    return by_task(name, tasks, found["results"], found.get("groups", {}))


def by_task(
    name: str,
    tasks: dict[str, list[dict[str, Any]]],
    said: dict[str, dict[str, Any]],
    groups: dict[str, dict[str, Any]],
) -> dict[str, tuple[Figures, Answers]]:
    """One entry for a group that is the mean over all items, otherwise one for each task.

    The mean of the tasks' means has other standard errors and differences than the pooled items.
    """
    if len(tasks) > 1 and name in groups:
        pooled = [sample for own in tasks.values() for sample in own]
        with contextlib.suppress(InputError):  # the group has no such figure
            figures, answers = _judged(name, pooled, groups[name])
            means = {metric: float(own.double().mean()) for metric, own in answers.right.items()}
            if all(math.isclose(figures[m], mean, abs_tol=1e-9) for m, mean in means.items()):
                return {name: (figures, answers)}
    return {own: _judged(own, samples, said[own]) for own, samples in tasks.items()}


def _judged(
    name: str, samples: list[dict[str, Any]], said: dict[str, Any]
) -> tuple[Figures, Answers]:
    """The harness's figures and answers of one task; of several filters the first."""
    behind = samples[0]["filter"]
    samples = [sample for sample in samples if sample["filter"] == behind]
    metrics = [m for m in (*METRICS, *samples[0]["metrics"]) if _counts(samples, m)]
    right = {m: points([float(s[m]) for s in samples]) for m in metrics if f"{m},{behind}" in said}
    if not right:
        raise InputError(
            f"task {name!r} has no figure that is a mean over its items; take another, such as "
            f"arc_easy."
        )
    chosen = [_chosen(sample, next(iter(right))) for sample in samples]
    judged_by = next(iter(right.values()))
    answers = Answers(right, torch.tensor(chosen), _chance(samples, judged_by.tolist()))
    means = {metric: float(said[f"{metric},{behind}"]) for metric in right}
    return answers.figures() | means, answers


def _counts(samples: list[dict[str, Any]], metric: str) -> bool:
    """Whether a metric is the mean of one number per item, which perplexity is not."""
    return metric != "perplexity" and all(
        isinstance(sample.get(metric), float | int) for sample in samples
    )


def _several(sample: dict[str, Any]) -> bool:
    """Whether an item has choices, each with its log-probability."""
    answers = sample["filtered_resps"]
    return len(answers) > 1 and all(isinstance(answer, tuple | list) for answer in answers)


def _chosen(sample: dict[str, Any], metric: str) -> int:
    """The most probable choice, or whether the single one is correct."""
    if not _several(sample):
        return int(bool(sample[metric]))
    totals = [float(answer[0]) for answer in sample["filtered_resps"]]
    totals = totals[: sample[CHOICES]]  # behind them may be the same without their context
    return totals.index(max(totals))


def _choices(task: Any, doc: Any) -> int | None:
    """Number of choices of an item; None for other kinds of tasks."""
    if task is None or task.get_config("output_type") != "multiple_choice":
        return None
    return len(task.doc_to_choice(doc))


def _chance(samples: list[dict[str, Any]], scored: list[float]) -> float | None:
    """Mean share of right answers at random, where every item has choices, and right or wrong ones.

    None for points in between and where there are other responses than one for each choice.
    """
    plain = all(_several(s) and len(s["filtered_resps"]) == s[CHOICES] for s in samples)
    if not plain or not {*scored} <= {0.0, 1.0}:
        return None
    right = [len(s["target"]) if isinstance(s["target"], list) else 1 for s in samples]
    return sum(
        own / len(sample["filtered_resps"]) for own, sample in zip(right, samples, strict=True)
    ) / len(samples)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Hide the harness's own progress bars."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
