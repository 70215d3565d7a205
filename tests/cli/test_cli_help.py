"""``--help`` answers at once, and importing the package pulls in nothing heavy."""

import subprocess
import sys

import pytest
from conftest import ROOT

BUDGET = ["--keep", "--target", "--tier", "--allocator", "--latency-batch", "--latency-length"]
BUDGET += ["--multiple-of", "--scores", "--statistics"]
COMMANDS = {
    "ls": ["--json"],
    "inspect": ["MODEL", "--multiple-of", "--json"],
    "plan": ["MODEL", *BUDGET, "--calibration", "--output", "--dry-run", "--overwrite", "--json"],
    "compress": ["MODEL", "OUT", *BUDGET, "--plan", "--method", "--calibration", "--samples"],
    "compare": ["RUN...", "--plot", "--overwrite", "--json"],
    "report": ["RUN", "--siblings"],
    "sweep": ["MODEL|SWEEP.yaml", "[OUT]", "--keep", "--recipe", "--jobs", "--ray", "--dry-run"],
    "push": ["RUN", "REPO", "--private"],
    "eval": ["MODEL", "--eval", "--eval-length", "--prompt", "--no-speed", "--device", "--json"],
}
HEAVY = "print(sorted({'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules)))"


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", "import sys\n" + code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_argument(run, command):
    shown = run(command, "--help").succeeded()
    for word in COMMANDS[command]:
        assert word in shown.out
    assert shown.err == ""


@pytest.mark.parametrize("args", [(), *((name,) for name in COMMANDS)], ids=str)
def test_help_fits_100_columns(run, args):
    shown = run(*args, "--help").succeeded()
    assert max(map(len, shown.out.splitlines())) <= 100


def test_group_help_lists_the_commands_and_what_to_type(run):
    shown = run("-h").succeeded().out
    for command in COMMANDS:
        assert f"\n  {command} " in shown
    assert "secateur compress Qwen/Qwen2.5-0.5B out --keep 0.8" in shown


def test_no_command_shows_the_help(run):
    shown = run()
    assert shown.code in (0, 2)
    assert "compress" in shown.out + shown.err


@pytest.mark.parametrize("args", [(), *((name,) for name in COMMANDS)], ids=str)
def test_help_imports_nothing_heavy(args):
    code = (
        f"sys.argv = ['secateur', *{list(args)!r}, '--help']\n"
        "from secateur.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n" + HEAVY
    )
    assert python(code).splitlines()[-1] == "[]"


@pytest.mark.parametrize("flags", [("--method", "modegpt"), ("-m", "modegpt")], ids=str)
@pytest.mark.parametrize("command", ["plan", "compress"])
def test_help_of_a_method_lists_its_options(run, command, flags):
    shown = run(command, *flags, "--help").succeeded().out
    for option in (
        "--leverage-ridge",
        "[modegpt]",
        "--temperature",
        "--max-sparsity",
        "[influence]",
    ):
        assert option in shown
    assert "--iterations" not in shown
    assert "--cells" not in shown
    assert max(map(len, shown.splitlines())) <= 100


@pytest.mark.parametrize("command", ["plan", "compress"])
def test_help_of_the_default_method_lists_its_options(run, command):
    shown = run(command, "--method", "auto", "--help").succeeded().out
    for option in ("--ridge", "--iterations", "[auto]", "--cells", "[knapsack]"):
        assert option in shown
    assert "--temperature" not in shown


@pytest.mark.parametrize("command", ["plan", "compress"])
def test_help_of_a_method_with_another_allocator_lists_the_options_of_both(run, command):
    flags = ("--method", "auto", "--allocator", "influence")
    shown = run(command, *flags, "--help").succeeded().out
    for option in ("--ridge", "--iterations", "[auto]", "--temperature", "[influence]"):
        assert option in shown
    assert "--cells" not in shown


@pytest.mark.parametrize("command", ["plan", "compress"])
def test_help_without_a_method_says_where_its_options_are(run, command):
    shown = " ".join(run(command, "--help").out.split())
    assert "--method auto --help" in shown
    assert "--ridge" not in shown


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--method", "flap", "--iterations", 3), ["auto or ispasp", "method flap", "fluctuation"]),
        (("--method", "obspa", "--taylor=mix"), ["--taylor", "method llm-pruner"]),
        (("--temperature", 1), ["allocator influence", "method auto", "allocator knapsack"]),
        (("--allocator", "uniform", "--cells", 9), ["knapsack or", "spdy", "allocator uniform"]),
    ],
)
def test_an_option_of_something_else_is_told_whose_it_is(run, room, flags, words):
    run("plan", "demo", *flags, "-o", room / "p.json").refused(flags[-2].split("=")[0], *words)


def test_an_option_of_nothing_is_none(run, room):
    refused = run("plan", "demo", "--temprature", 1, "-o", room / "p.json")
    refused.refused("--temprature")
    assert "belongs" not in refused.message[0]


def test_version(run):
    from secateur import __version__

    assert __version__ in run("--version").succeeded().out


def test_import_is_light():
    assert python("import secateur\n" + HEAVY).strip() == "[]"


KNOWN = """
try:
    print(AutoConfig.for_model('secateur_llama').model_type)
except ValueError:
    print('unknown')
"""


@pytest.mark.parametrize("order", ["secateur first", "transformers first"])
def test_import_registers_with_transformers(order):
    parts = ["import secateur\n", "from transformers import AutoConfig\n"]
    parts = parts if order == "secateur first" else parts[::-1]
    assert python("".join(parts) + KNOWN).strip() == "secateur_llama"


def test_module_runs_as_a_program(secateur):
    shown = secateur("--help").succeeded()
    assert shown.out.startswith("Usage: ")
    assert shown.err == ""
