"""What other processes find in checkpoints, with the package and without."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.families import FAMILIES

SCRIPT = Path(__file__).with_name("reader.py")


@dataclass(frozen=True)
class Reading:
    """What a fresh process found in a checkpoint."""

    facts: dict[str, Any]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Job:
    """A checkpoint to read, the class of transformers that opens it, and what that is asked."""

    folder: Path
    auto: str
    asked: Mapping[str, Tensor]


class Reader:
    """Reads checkpoints on one route: "secateur" imports the package; "stranger" cannot, and trusts
    the code beside the weights. It starts with the first of them."""

    def __init__(self, route: str, folder: Path) -> None:
        self.route, self.folder = route, folder
        self.process: subprocess.Popen[str] | None = None
        self.count = 0

    def read(self, jobs: Mapping[str, Job]) -> dict[str, Reading]:
        """Read some checkpoints in one fresh process; a name that ends with /plain or /full says
        that stock classes open it."""
        self.count += 1
        folder = self.folder / str(self.count)
        folder.mkdir()
        requests = {n: {"folder": str(job.folder), "auto": job.auto} for n, job in jobs.items()}
        (folder / "jobs.json").write_text(json.dumps(requests))
        given = {f"{n}:{key}": v for n, job in jobs.items() for key, v in job.asked.items()}
        save_file(given, folder / "inputs.safetensors")
        code = self._ask(folder)
        assert code == "0", (code, (self.folder / "errors.txt").read_text()[-3000:])
        facts = json.loads((folder / "facts.json").read_text())
        tensors = load_file(folder / "tensors.safetensors")
        found = {}
        for name in jobs:
            assert "error" not in facts[name], facts[name]["error"]
            own = {k[len(name) + 1 :]: v for k, v in tensors.items() if k.startswith(name + ":")}
            found[name] = Reading(facts[name], own)
        return found

    def _ask(self, folder: Path) -> str:
        if self.process is None:
            self.process = self._start()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{folder}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def _start(self) -> subprocess.Popen[str]:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
            "HF_MODULES_CACHE": str(self.folder / "modules"),
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        if self.route == "secateur":
            environment["PYTHONPATH"] = str(SCRIPT.parents[2])
        configs = sorted({family.config for family in FAMILIES.values()})
        with (self.folder / "errors.txt").open("w") as errors:
            return subprocess.Popen(
                [sys.executable, str(SCRIPT), self.route, *configs],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.communicate()
