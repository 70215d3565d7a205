"""Comparison of a file in llama.cpp with the model in transformers."""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.export.gguf.tokens import asked, check_said
from secateur.models.model import Model
from secateur.utils.errors import RunError

SCRIPT = Path(__file__).with_name("llama_run.py")
PROMPT, GREEDY = 24, 16
STRIDE = 7919  # a prime, so that the prompt's tokens are all over the vocabulary
#: Largest difference of a logit, relative to the spread of all. llama.cpp rounds what matrices read
#: to the format of their weights.
TOLERANCE = {"f32": 1e-3, "f16": 0.05, "bf16": 0.15}
#: Root mean square of the differences, likewise, of blocks of few bits. Two models that have
#: nothing to do with each other differ by more than one.
LOOSE = {"q8_0": 0.15}
LOOSEST = 0.7


@dataclass(frozen=True)
class Finding:
    """How far llama.cpp's logits are from the model's, relative to their spread.

    Attributes:
        largest: largest difference of one.
        root_mean_square: of all.
        same: greedy tokens that both choose, of ``greedy``.
        greedy: how many were compared.
    """

    largest: float
    root_mean_square: float
    same: int
    greedy: int


@dataclass(frozen=True)
class Reference:
    """The model's logits for a prompt and its own greedy continuation."""

    prompt: list[int]
    following: list[int]
    logits: Tensor


def available() -> bool:
    """Whether llama.cpp is installed."""
    return find_spec("llama_cpp") is not None


def reference(model: Model) -> Reference:
    """Run the model in its compute format."""
    embedding: Any = model.module.get_input_embeddings()
    vocabulary = len(embedding.weight)
    room = (model.positions or PROMPT + GREEDY) - 1
    count = max(1, min(PROMPT, room // 2))
    prompt = torch.tensor([[(1 + i) * STRIDE % vocabulary for i in range(count)]])
    ids = prompt.to(model.device)
    module: Any = model.module
    with torch.inference_mode():
        for _ in range(min(GREEDY, room - count)):  # no cache: nothing else can be wrong here
            step = module(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)
            ids = torch.cat((ids, step), 1)
        logits = module(input_ids=ids, use_cache=False).logits[0].float().cpu()
    row = ids[0].tolist()
    return Reference(row[:count], row[count:], logits)


def compare(file: Path, kind: str, told: Reference, tokenizer: Any) -> Finding:
    """Run a file in llama.cpp and compare it with the reference; ``tokenizer`` is None without one.

    Raises:
        RunError: llama.cpp doesn't run it, or says something else.
        InputError: it reads text otherwise than the tokenizer.
    """
    expected = [] if tokenizer is None else asked(tokenizer)
    vocabulary = told.logits.shape[1]
    request = {
        "file": str(file.absolute()),
        "prompt": told.prompt,
        "following": told.following,
        "texts": [text for text, _ in expected],
        "vocabulary": vocabulary,
    }
    with tempfile.TemporaryDirectory() as folder:
        in_llama(Path(folder), request)
        said = json.loads(Path(folder, "said.json").read_text())
        found = torch.from_numpy(np.load(Path(folder, "logits.npy")))
    check_said(expected, said)
    finding = difference(told, found)
    judge(finding, kind)
    return finding


def difference(told: Reference, found: Tensor) -> Finding:
    """The difference of two sets of logits."""
    spread = told.logits.std().clamp_min(1e-12)
    apart = (found - told.logits) / spread
    greedy = len(told.following)
    start = len(told.prompt) - 1
    chosen = found[start : start + greedy].argmax(1).tolist()
    return Finding(
        largest=float(apart.abs().max()),
        root_mean_square=float(apart.square().mean().sqrt()),
        same=sum(a == b for a, b in zip(chosen, told.following, strict=True)),
        greedy=greedy,
    )


def judge(finding: Finding, kind: str) -> None:
    """Refuse a file whose logits differ too much.

    In exact formats no logit may differ much, so greedy tokens are equal except for ties.

    Raises:
        RunError: it does.
    """
    exact = TOLERANCE.get(kind)
    found = finding.root_mean_square if exact is None else finding.largest
    if not found <= (LOOSE.get(kind, LOOSEST) if exact is None else exact):
        what = "on average" if exact is None else "at most"
        raise RunError(
            f"llama.cpp reads the file ({kind}) but does not compute the model: logits differ by "
            f"{found:.2g} of their spread {what}, and {finding.same} of {finding.greedy} greedy "
            f"tokens are the same. Nothing was kept; please report this."
        )


def in_llama(folder: Path, request: dict[str, Any]) -> None:
    """Run llama.cpp in a separate process, with a folder for its output.

    Raises:
        RunError: it failed.
    """
    threads = torch.get_num_threads()
    (folder / "request.json").write_text(json.dumps(request | {"threads": threads}))
    done = subprocess.run(
        [sys.executable, "-P", str(SCRIPT), str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        process_group=0,  # Ctrl-C is for the parent, which ends this process
        check=False,
    )
    if done.returncode or not (folder / "done").exists():
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        telling = [line for line in lines if "error" in line.lower() or "ASSERT" in line]
        reason = (telling or lines or ["it said nothing"])[-1]
        raise RunError(
            f"llama.cpp did not run the file ({done.returncode}): {reason}. Nothing was kept; "
            f"please report this."
        )
