"""The command lines that the README shows do what it says."""

import re
import shlex

import pytest
from conftest import ROOT

README = ROOT / "README.md"


def command_lines():
    """Every ``secateur …`` line of the README's shell blocks, prompts and comments taken off."""
    if not README.exists():
        return []
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", README.read_text(encoding="utf-8"), re.S | re.M)
    shell = "\n".join(body for language, body in blocks if language != "python")
    lines = [line.removeprefix("$ ") for line in shell.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line[:9] == "secateur "]


@pytest.mark.skipif(not command_lines(), reason="no README with command lines")
def test_command_lines_run_in_order(run, model, text, held, room, near, monkeypatch):
    """MODEL, TEXT, hub ids and file names stand for what a reader has; here they are small."""
    monkeypatch.chdir(room)
    steps = "[{method: auto}, {method: svd-llm, keep: 0.5, options: {rank_step: 1}}]"
    (room / "recipe.yaml").write_text(f"steps: {steps}")
    stand_ins = {"MODEL": model, "demo": model, "TEXT": text, "OTHER_TEXT": held}
    for command, *args in command_lines():
        given = [stand_ins.get(arg, arg) for arg in args]
        given = [text if re.search(r"\.(txt|jsonl)$", str(arg)) else arg for arg in given]
        if args and re.fullmatch(r"[\w.-]+/[\w.-]+", args[0]):
            given[0] = model
        given = [arg.split(",")[0] if arg == "0.9,0.8,0.7" else arg for arg in given]  # fewer runs
        if command in ("compress", "eval", "sweep"):
            given += ["--no-speed", "--eval-windows", 2, "--new-tokens", 4]
        if (command in ("compress", "plan", "sweep") and "--plan" not in args) or "--forms" in args:
            given += ["--samples", 4, "--length", 32]
        if "gptq" in args:
            given += ["--group", 16]  # of which the rows of so small a model are multiples
        run(command, *given).succeeded()
