"""A tiny checkpoint, texts, and a command line that runs inside the test's own process."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import json
import random
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support import met

ROOT = Path(__file__).parents[2]
SMALL = [
    "--no-speed",
    "--samples",
    "4",
    "--length",
    "32",
    "--eval-windows",
    "2",
    "--new-tokens",
    "4",
]
PROSE = (
    "the gardener cuts old wood in early spring so that young branches find light and air "
    "a sharp blade leaves a clean wound while dull shears crush what should heal roots drink "
    "water stones hold warmth and patience makes apples sweet"
)
WEIGHTS = "model.safetensors"
COUNTED = {
    "parameters": "parameters",
    "bytes": "bytes",
    "flops": "flops_per_token",
    "cache": "cache_bytes_per_token",
}
PARAMETERS = 2 * (3 * 64 * 32 + 2 * 8 * 32 * 6)  # of what can shrink in ``model``
WHOLE = {
    "parameters": PARAMETERS,
    "bytes": 4 * PARAMETERS,
    "flops": 2 * PARAMETERS,
    "cache": 2 * 2 * (8 + 8) * 4,
}
ALLOCATORS = ("uniform", "influence", "knapsack", "fluctuation")
TIMES = {  # nanoseconds of a machine that tests can rely on; 2400 of them are fixed
    "nanoseconds": {
        "mlp": {0: 0, 64: 6400},
        "query_key": {0: 0, 8: 800},
        "value_output": {0: 0, 8: 1600},
    },
    "forward": 20_000,
}


@dataclass(frozen=True)
class Result:
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    def refused(self, *words: str) -> None:
        """One message without a traceback, exit code 2, every word in it."""
        assert self.code == 2, (self.code, self.err)
        assert "Traceback" not in self.err, self.err
        assert len(self.message) == 1, self.err
        for word in words:
            assert word.lower() in self.message[0].lower(), (word, self.message[0])
        assert self.out == "", self.out

    @property
    def message(self) -> list[str]:
        lines = self.err.splitlines()
        return [line for line in lines if line.lower().startswith("error:")]

    def succeeded(self) -> "Result":
        assert self.code == 0, self.err
        return self


def sentences(seed: int, count: int) -> str:
    chosen, known = random.Random(seed), PROSE.split()
    made = []
    for _ in range(count):
        words = chosen.choices(known, k=chosen.randint(6, 14))
        made.append(" ".join(words).capitalize() + ".")
    return " ".join(made) + "\n"


def save_checkpoint(folder: Path, config: Any, tokenizer: Any, seed: int = 0) -> Path:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([sentences(0, 200)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")


@pytest.fixture(scope="session")
def llama_config() -> Callable[..., Any]:
    from transformers import LlamaConfig

    def make(**changes: Any) -> Any:
        shape: dict[str, Any] = {
            "vocab_size": 320,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "initializer_range": 0.2,
            "bos_token_id": None,
            "eos_token_id": 0,
        }
        return LlamaConfig(**(shape | changes))

    return make


@pytest.fixture(scope="session")
def model(
    tmp_path_factory: pytest.TempPathFactory, llama_config: Callable[..., Any], tokenizer: Any
) -> Path:
    """A checkpoint that no test may change."""
    return save_checkpoint(tmp_path_factory.mktemp("models") / "llama", llama_config(), tokenizer)


@pytest.fixture
def broken(model: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint for a test to damage, in a folder of its own."""
    return Path(shutil.copytree(model, tmp_path / "models" / "broken"))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "calibration.txt"
    path.write_text(sentences(1, 200))
    return path


@pytest.fixture(scope="session")
def held(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "held.txt"
    path.write_text(sentences(2, 100))
    return path


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """An empty folder for the output; a refused run must leave it empty."""
    folder = tmp_path / "room"
    folder.mkdir()
    return folder


@pytest.fixture
def forget(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that empties the user's cache for what follows in the test."""

    def emptied() -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))

    return emptied


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """``run("ls", "--json")`` does what ``secateur ls --json`` does, in this process."""
    from secateur.cli.main import main

    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # main() changes it
    monkeypatch.setenv("COLUMNS", "100")

    def command(*args: Any) -> Result:
        monkeypatch.setattr(sys, "argv", ["secateur", *map(str, args)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        code = stop.value.code
        if code in (None, 0) and not {"--help", "-h"} & set(args):
            met.note_command(str(args[0]) if args else "")
        return Result(0 if code is None else int(code), *capfd.readouterr())

    return command


@pytest.fixture(scope="session")
def secateur() -> Callable[..., Result]:
    """``python -m secateur`` in a process of its own, as a user has it."""

    def command(*args: Any, **options: Any) -> Result:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
        done = subprocess.run(
            [sys.executable, "-m", "secateur", *map(str, args)],
            capture_output=True,
            text=True,
            env=env | options.pop("env", {}),
            check=False,
            **options,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    return command


@pytest.fixture
def compress(run: Any, near: list[str], model: Path, text: Path, held: Path, room: Path) -> Any:
    """A small, quick ``compress`` into ``room/out``; more arguments override."""

    def command(*args: Any, source: Any = None, out: Any = None) -> Result:
        given = ["--calibration", text, "--eval", held]
        places = (model if source is None else source, out or room / "out")
        return run("compress", *places, *given, *SMALL, *args)

    return command


@pytest.fixture
def given(text):
    return ["--calibration", text, "--samples", 4, "--length", 32]


@pytest.fixture
def plan(run, model, given):
    """The plan that a few flags lead to."""

    def made(*flags, source=None):
        shown = run("plan", source or model, *given, "--dry-run", "--json", *flags)
        return json.loads(shown.succeeded().out)

    return made


@pytest.fixture
def refused(run, model, given, room):
    """Hold the refusal of a plan against words; it leaves nothing."""

    def check(*flags, words=(), source=None):
        found = run("plan", source or model, *given, "-o", room / "p.json", *flags)
        found.refused(*words)
        assert list(room.iterdir()) == []
        return found.message[0]

    return check


@pytest.fixture
def replay(run, model, held, room, near):
    """Apply a plan, given as data, and return the record of the result."""

    def applied(content):
        (room / "plan.json").write_text(json.dumps(content))
        judge = ["--eval", held, "--no-speed", "--eval-windows", 2, "--new-tokens", 4]
        run("compress", model, room / "out", "--plan", room / "plan.json", *judge).succeeded()
        return json.loads((room / "out" / "secateur" / "report.json").read_text())

    return applied


@pytest.fixture
def machine(monkeypatch, forget):
    """A machine of known times and an empty cache; the value lists what was measured on it."""
    from secateur.scoring import latency

    measured = []

    def times(model, goal, own):
        measured.append((goal.batch, goal.length))
        return latency.Table(of=own, **TIMES)

    forget()
    monkeypatch.setattr(latency, "_measure", times)
    return measured


def sizes(plan, kind=None):
    return {row["unit"]: row["after"] for row in plan["units"] if kind in (None, row["kind"])}


def numbers_on_disk(folder):
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors").values()
    return sum(t.numel() for t in tensors if t.is_floating_point())


def opened(folder):
    """The class that transformers opens a folder with, once every weight has found its place."""
    from transformers import AutoModelForCausalLM

    module, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return type(module)


def report_of(out):
    return json.loads((out / "secateur" / "report.json").read_text())


@pytest.fixture(scope="session")
def finished(secateur, model, text, held, tmp_path_factory):
    """One whole run as a user has it, with JSON and speed; no test may change it."""
    out = tmp_path_factory.mktemp("finished") / "out"
    given = ["--calibration", text, "--eval", held, "--json", *SMALL[1:]]
    return out, secateur("compress", model, out, *given).succeeded()
