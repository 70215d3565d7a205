"""Measure one checkpoint in a process of its own, so that memory and speed are its own too."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.errors import InputError, RunError
from secateur.evaluate.memory import peak_bytes
from secateur.evaluate.perplexity import perplexity
from secateur.evaluate.reload import disagreement, testimony
from secateur.evaluate.speed import measure_speed
from secateur.model import Model, Settings, locate, open_model
from secateur.progress import Progress, for_terminal
from secateur.text import Tokens, contiguous, read_documents, token_stream

USER_ERROR = 2
PROMPT_TOKENS = 24
DEFAULT_LENGTH = 256
NEW_TOKENS = 40


@dataclass(frozen=True)
class Text:
    """A text to judge on: the part of a source from the share ``start`` on, under a name."""

    name: str
    source: str
    start: float = 0.0


@dataclass(frozen=True)
class Questions:
    """What to measure, the same for every model of a run.

    Attributes:
        texts: what perplexity is taken on.
        length: tokens in a window; by default 256, or all positions of a shorter model.
        windows: at most this many windows of each text, from its start.
        prompt: text that the model continues; by default the beginning of the first text.
        new_tokens: length of the continuation; by default 40, or what fits.
        speed: whether to time it.
    """

    texts: tuple[Text, ...]
    length: int | None = None
    windows: int = 256
    prompt: str | None = None
    new_tokens: int | None = None
    speed: bool = True


@dataclass
class Verdict:
    """What was measured. ``peak_memory_bytes`` counts from before the weights were loaded."""

    parameters: int
    bytes: int
    perplexity: dict[str, float]
    tokens: dict[str, int]
    prompt: str
    sample: str
    peak_memory_bytes: int
    speed: dict[str, float] = field(default_factory=dict)
    tasks: dict[str, float] = field(default_factory=dict)


def text_tokens(text: Text, tokenizer: Any, questions: Questions, length: int) -> Tokens:
    """The windows of one text."""
    stream = token_stream(read_documents(text.source, "held"), tokenizer)
    stream = stream[int(text.start * len(stream)) :]
    return contiguous(stream, length, questions.windows, f"text {text.name!r}")


def judge(model: Model, questions: Questions, before: int, progress: Progress) -> Verdict:
    """Measure an open model; ``before`` is the process's peak memory before it was opened."""
    room = model.positions or sys.maxsize
    length = questions.length or min(DEFAULT_LENGTH, room)
    if length > room:
        raise InputError(f"--eval-length {length} is more than the model's {room} positions.")
    windows = {t.name: text_tokens(t, model.tokenizer, questions, length) for t in questions.texts}
    values = {}
    for name, tokens in windows.items():
        with progress.stage(f"perplexity: {name}"[:28], len(tokens.ids)) as advance:
            values[name] = perplexity(model.module, tokens, advance)
    prompt = _prompt(model.tokenizer, questions, windows)
    if not 0 < len(prompt) < room:
        raise InputError(f"--prompt has {len(prompt)} tokens; it needs between 1 and {room - 1}.")
    new_tokens = questions.new_tokens or min(NEW_TOKENS, room - len(prompt))
    if len(prompt) + new_tokens > room:
        raise InputError(
            f"--new-tokens {new_tokens} behind a prompt of {len(prompt)} is more than the model's "
            f"{room} positions."
        )
    sample = _continued(model, prompt, new_tokens)
    speed: dict[str, float] = {}
    if questions.speed and windows:
        new = min(32, room // 2)
        ids = next(iter(windows.values())).ids.flatten()[: min(length, room - new)]
        with progress.stage("speed", 1) as advance:
            speed = asdict(measure_speed(model.module, ids, new))
            advance(1)
    return Verdict(
        parameters=sum(p.numel() for p in model.module.parameters()),
        bytes=weight_bytes(model),
        perplexity=values,
        tokens={name: tokens.count for name, tokens in windows.items()},
        prompt=str(model.tokenizer.decode(prompt, skip_special_tokens=True)),
        sample=sample,
        peak_memory_bytes=max(0, peak_bytes(model.device) - before),
        speed=speed,
    )


def _prompt(tokenizer: Any, questions: Questions, windows: dict[str, Tokens]) -> Tensor:
    if questions.prompt is not None:
        return torch.tensor(tokenizer(questions.prompt)["input_ids"], dtype=torch.int64)
    if not windows:
        return torch.tensor([tokenizer.bos_token_id or 0])
    first = next(iter(windows.values())).ids[0]
    return first[: min(PROMPT_TOKENS, max(1, len(first) // 2))]


def _continued(model: Model, prompt: Tensor, new_tokens: int) -> str:
    ids = prompt.unsqueeze(0).to(model.device)
    module: Any = model.module
    out = module.generate(
        ids,
        attention_mask=ids.new_ones(ids.shape),
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=0,
    )
    return str(model.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def weight_bytes(model: Model) -> int:
    """Size of the weight files on disk; of the stored tensors where the folder is not local."""
    files = list(Path(locate(model.source)).glob("model*.safetensors"))
    if files:
        return sum(file.stat().st_size for file in files)
    return sum(p.numel() for p in model.module.parameters()) * model.stored.itemsize


def judge_apart(
    source: str,
    questions: Questions,
    settings: Settings,
    progress: Progress,
    memory: dict[str, Tensor] | None = None,
    ids: Tensor | None = None,
) -> Verdict:
    """Measure a checkpoint in a fresh process.

    With ``memory``, the testimony of a model about ``ids``, the checkpoint must also testify the
    same when it is reloaded there.

    Raises:
        InputError: the checkpoint or a text is unusable; the child's own message.
        RunError: the process died, or the reloaded checkpoint is not the model in memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        request, result = Path(folder, "request.json"), Path(folder, "result.json")
        content = {"source": source, "questions": asdict(questions), "settings": asdict(settings)}
        if memory is not None and ids is not None:
            save_file({**memory, "ids": ids}, Path(folder, "memory.safetensors"))
            content["memory"] = str(Path(folder, "memory.safetensors"))
        request.write_text(json.dumps(content))
        # The child must find this very package, wherever the parent's came from.
        path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, "-m", "secateur.evaluate.judge", str(request), str(result)],
            env={**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)},
            stdout=subprocess.DEVNULL,  # the parent's may be JSON for a machine
            process_group=0,  # Ctrl-C is for the parent, which ends this process
            check=False,
        )
        answer = json.loads(result.read_text()) if result.exists() else {}
    if "error" in answer:
        raise InputError(answer["error"])
    if "differs" in answer:
        raise RunError(
            f"the checkpoint, loaded again, is not the model that was compressed: "
            f"{answer['differs']}. Nothing was kept; please report this."
        )
    if done.returncode != 0 or not answer:
        killed = done.returncode == -signal.SIGKILL
        reason = "was killed, probably for want of memory" if killed else "failed"
        raise RunError(f"the process that measured {source!r} {reason} ({done.returncode}).")
    return Verdict(**answer)


def quiet() -> None:
    """Keep transformers' own bars and advice off the terminal; errors still show."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def main(request: Path, result: Path) -> int:
    """The child's side of :func:`judge_apart`."""
    quiet()
    content = json.loads(request.read_text())
    settings = Settings(**content["settings"])
    texts = tuple(Text(**text) for text in content["questions"].pop("texts"))
    questions = Questions(texts=texts, **content["questions"])
    answer: dict[str, Any]
    try:
        before = peak_bytes(settings.torch_device())
        model = open_model(content["source"], settings)
        answer = asdict(judge(model, questions, before, for_terminal()))
        if "memory" in content:
            memory = load_file(content["memory"])
            differs = disagreement(memory, testimony(model.module, memory.pop("ids")))
            if differs is not None:
                answer = {"differs": differs}
    except InputError as error:
        answer = {"error": str(error)}
    result.write_text(json.dumps(answer))
    return USER_ERROR if "error" in answer else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
