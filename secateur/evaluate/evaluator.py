"""Measure one checkpoint in a separate process, so that memory and speed are its own."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from secateur.data.tasks import CausalLM, Use
from secateur.data.tokens import Text, Tokens
from secateur.evaluate import lm_eval
from secateur.evaluate.agreement import compared, outputs
from secateur.evaluate.damage.summary import damage
from secateur.evaluate.measurements import Measurements, Questions
from secateur.evaluate.memory import peak_bytes
from secateur.evaluate.perplexity import answered
from secateur.evaluate.significance import Answers, Figures
from secateur.evaluate.speed import measure_speed
from secateur.evaluate.task_file import answered_file, is_file, read_task
from secateur.evaluate.verify import (
    ReferenceOutputs,
    disagreement,
    forgetful,
    reference_outputs,
    streamed_reference_outputs,
)
from secateur.models.loading import locate
from secateur.models.model import Model, Settings
from secateur.models.streamed_loading import open_fitting
from secateur.utils.errors import HaltedError, InputError, RunError, out_of_memory
from secateur.utils.progress import Progress, for_terminal

USER_ERROR = 2
PROMPT_TOKENS = 24
DEFAULT_LENGTH = 256
NEW_TOKENS = 40
FEW_NEW_TOKENS = 4  # where each takes a pass over the weight files


def judge(
    model: Model,
    questions: Questions,
    before: int,
    progress: Progress,
    outputs_of_dense: Path | None = None,
) -> Measurements:
    """Measure an open model; ``before`` is the process's peak memory before it was opened.

    ``outputs_of_dense`` is the file for the dense model's outputs. If it exists, the model is
    compared with these outputs; otherwise the outputs of the model are written to it.
    """
    room, use = model.positions or sys.maxsize, model.use
    length = _checked_length(model, questions, room)
    loaded = lm_eval.load([task for task in questions.tasks if not is_file(task)])
    texts = questions.texts
    held = {t.name: use.held(t, model.tokenizer, length, questions.windows) for t in texts}
    values, tasks = _answered(model, held, progress)
    first = next(iter(held.values()), None)
    prompt, sample = _sampled(model, questions, held, room) if use.writes else ("", "")
    speed = {} if first is None else _speed(model, questions, first, length, progress)
    peak = max(0, peak_bytes(model.device) - before)
    scores, kept = _tasks(model, questions, loaded, progress)
    if first is not None and outputs_of_dense is not None:
        kept |= {"outputs": outputs(model, first)} | ({"text": first.ids} if use.reads_text else {})
    agrees, changed = compared(kept, [*scores], outputs_of_dense)
    found = damage(model, first, room, progress) if questions.damage and first is not None else {}
    return Measurements(
        parameters=sum(p.numel() for p in model.module.parameters()),
        bytes=weight_bytes(model),
        perplexity=values,
        tokens={name: use.amount(tokens) for name, tokens in held.items()},
        prompt=prompt,
        sample=sample,
        peak_memory_bytes=peak,
        speed=speed,
        counts=use.counts,
        tasks=tasks,
        agreement=agrees,
        task_scores=scores,
        task_changes=changed,
        damage=found,
        texts={name: tokens.fingerprint for name, tokens in held.items()},
    )


def _checked_length(model: Model, questions: Questions, room: int) -> int:
    """Tokens in a window.

    Raises:
        InputError: the model reads fewer, or can't be asked what the questions ask.
    """
    length, use = questions.length or min(DEFAULT_LENGTH, room), model.use
    if length > room:
        raise InputError(f"--eval-length {length} is more than the model's {room} positions.")
    if not use.writes and (questions.prompt is not None or questions.new_tokens is not None):
        raise InputError(
            f"--prompt and --new-tokens: this {use.what} writes nothing; leave them out."
        )
    check_tasks(use, questions.tasks)
    return length


def _answered(
    model: Model, held: dict[str, Tokens], progress: Progress
) -> tuple[dict[str, float], dict[str, float]]:
    """Perplexity on each text and, for models with labels, the accuracy."""
    values, tasks = {}, {}
    for name, tokens in held.items():
        with progress.stage(f"perplexity: {name}"[:28], len(tokens)) as advance:
            values[name], right = answered(model, tokens, advance)
        if model.use.share is not None:
            tasks[f"{model.use.share}, {name}"] = right
    return values, tasks


def _speed(
    model: Model, questions: Questions, first: Tokens, length: int, progress: Progress
) -> dict[str, float]:
    """Prefill and decode speed; empty if not requested, or if the model is read from disk."""
    if not questions.speed:
        return {}
    if model.offload is not None:
        progress.say("note: it is read from disk block by block, so its speed is not measured")
        return {}
    use, room = model.use, model.positions or sys.maxsize
    new = min(32, room // 2) if use.writes else 0
    with progress.stage("speed", 1) as advance:
        timed = measure_speed(model, use.beginning(first, min(length, room - new)), new)
        advance(1)
    return {name: value for name, value in asdict(timed).items() if value is not None}


def check_tasks(use: Use, tasks: tuple[str, ...]) -> None:
    """Check tasks before anything is measured; harness tasks only when they are loaded.

    Raises:
        InputError: a model of that use can't answer them, or a file is no task.
    """
    if tasks and not isinstance(use, CausalLM):
        raise InputError(
            f"--tasks: this is a {use.what}, and tasks ask a causal language model how likely a "
            f"text is; leave them out."
        )
    for task in filter(is_file, tasks):
        read_task(task)


def _tasks(
    model: Model, questions: Questions, loaded: dict[str, Any], progress: Progress
) -> tuple[dict[str, Figures], dict[str, Tensor]]:
    """Figures of every task, and the answers for the comparison of two models."""
    found: dict[str, tuple[Figures, Answers]] = {}
    names = [Path(task).stem if is_file(task) else task for task in questions.tasks]
    for task, name in zip(questions.tasks, names, strict=True):
        if not is_file(task):
            found |= lm_eval.judged(model, loaded[task], task, questions.task_limit, progress)
            continue
        asked = read_task(task, questions.task_limit)
        with progress.stage(f"task: {name}"[:28], asked.requests) as advance:
            answers = answered_file(model, asked, advance)
        found[name if names.count(name) == 1 else task] = answers.figures(), answers
    kept = (answers.tensors(name) for name, (_, answers) in found.items())
    return {n: f for n, (f, _) in found.items()}, {k: v for own in kept for k, v in own.items()}


def _sampled(
    model: Model, questions: Questions, held: dict[str, Tokens], room: int
) -> tuple[str, str]:
    """A prompt, and the model's continuation."""
    prompt = _prompt(model.tokenizer, questions, held)
    if not 0 < len(prompt) < room:
        raise InputError(f"--prompt has {len(prompt)} tokens; it needs between 1 and {room - 1}.")
    usual = NEW_TOKENS if model.offload is None else FEW_NEW_TOKENS
    new_tokens = questions.new_tokens or min(usual, room - len(prompt))
    if len(prompt) + new_tokens > room:
        raise InputError(
            f"--new-tokens {new_tokens} behind a prompt of {len(prompt)} is more than the model's "
            f"{room} positions."
        )
    hidden = model.use.share is not None  # what stands for it must be seen
    shown = str(model.tokenizer.decode(prompt, skip_special_tokens=not hidden))
    return shown, _continued(model, prompt, new_tokens)


def _prompt(tokenizer: Any, questions: Questions, held: dict[str, Tokens]) -> Tensor:
    if questions.prompt is not None:
        return torch.tensor(tokenizer(questions.prompt)["input_ids"], dtype=torch.int64)
    if not held:
        return torch.tensor([tokenizer.bos_token_id or 0])
    first = next(iter(held.values())).ids[0]
    return first[: min(PROMPT_TOKENS, max(1, len(first) // 2))]


def _continued(model: Model, prompt: Tensor, new_tokens: int) -> str:
    ids = prompt.unsqueeze(0).to(model.device)
    new = model.use.generated(model.module, ids, new_tokens)
    hidden = model.use.share is not None
    return str(model.tokenizer.decode(new[0], skip_special_tokens=not hidden))


def weight_bytes(model: Model) -> int:
    """Size of the weight files on disk, or of the stored tensors if the folder is not local."""
    files = list(Path(locate(model.source)).glob("model*.safetensors"))
    if files:
        return sum(file.stat().st_size for file in files)
    return sum(p.numel() for p in model.module.parameters()) * model.stored.itemsize


def measure_in_subprocess(
    source: str,
    questions: Questions,
    settings: Settings,
    progress: Progress,
    said: ReferenceOutputs | None = None,
    outputs_of_dense: Path | None = None,
    scratch: Path | None = None,
) -> Measurements:
    """Evaluate a checkpoint in a fresh process, which can use the folder ``scratch``.

    The reloaded checkpoint must agree with ``said``, the reference outputs of the model in memory.
    :func:`judge` describes ``outputs_of_dense``.

    Raises:
        InputError: the checkpoint or a text is unusable; the child's own message.
        HaltedError: the process died, or a file could not be read or written.
        RunError: the reloaded checkpoint is not the model in memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        request, result = Path(folder, "request.json"), Path(folder, "result.json")
        content = {"source": source, "questions": asdict(questions), "settings": asdict(settings)}
        if outputs_of_dense is not None:
            content["outputs_of_dense"] = str(outputs_of_dense.absolute())
        if scratch is not None:
            content["scratch"] = str(scratch.absolute())
        if said is not None:
            said.save(Path(folder, "memory.safetensors"))
            content["memory"] = str(Path(folder, "memory.safetensors"))
        request.write_text(json.dumps(content))
        # The child must find this very package, wherever the parent's came from.
        path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, "-m", "secateur.evaluate.evaluator", str(request), str(result)],
            # and libraries keep their bars off the terminal, where the child has its own
            env={**os.environ, "PYTHONPATH": path.rstrip(os.pathsep), "TQDM_DISABLE": "1"},
            stdout=subprocess.DEVNULL,  # the parent's may be JSON for a machine
            process_group=0,  # Ctrl-C is for the parent, which ends this process
            check=False,
        )
        answer = json.loads(result.read_text()) if result.exists() else {}
    if "error" in answer:
        raise InputError(answer["error"])
    if "halted" in answer:
        raise HaltedError(answer["halted"])
    if "differs" in answer:
        raise RunError(
            f"the checkpoint, loaded again, is not the model that was compressed: "
            f"{answer['differs']}. Nothing was kept; please report this."
        )
    if done.returncode != 0 or not answer:
        killed = done.returncode == -signal.SIGKILL
        reason = "was killed, probably for want of memory" if killed else "failed"
        raise HaltedError(f"the process that measured {source!r} {reason} ({done.returncode}).")
    return Measurements(**answer)


def quiet() -> None:
    """Hide transformers' progress bars and advice; errors are still shown."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _watch(parent: int) -> None:
    """End this process when its parent ends, for whatever reason."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def main(request: Path, result: Path) -> int:
    """The child process of :func:`measure_in_subprocess`."""
    quiet()
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()
    content = json.loads(request.read_text())
    settings = Settings(**content["settings"])
    texts = tuple(Text(**text) for text in content["questions"].pop("texts"))
    tasks = tuple(content["questions"].pop("tasks"))
    questions = Questions(texts=texts, tasks=tasks, **content["questions"])
    answer: dict[str, Any]
    try:
        before = peak_bytes(settings.torch_device())
        scratch = Path(content.get("scratch", request.parent))
        model = open_fitting(content["source"], settings, scratch)
        kept = content.get("outputs_of_dense")
        kept = None if kept is None else Path(kept)
        answer = asdict(judge(model, questions, before, for_terminal(), kept))
        if "memory" in content:
            memory, tokens = ReferenceOutputs.load(Path(content["memory"]))
            if model.offload is None:
                differs = disagreement(memory, reference_outputs(model, tokens))
            else:
                differs = disagreement(memory, streamed_reference_outputs(model, tokens))
                differs = differs or (forgetful(model, tokens) if model.use.writes else None)
            if differs is not None:
                answer = {"differs": differs}
    except InputError as error:
        answer = {"error": str(error)}
    except (OSError, HaltedError) as error:
        answer = {"halted": str(error)}
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        answer = {"halted": f"measuring {content['source']!r} takes more memory than there is."}
    result.write_text(json.dumps(answer))
    return USER_ERROR if "error" in answer else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
