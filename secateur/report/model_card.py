"""The model card: README.md beside the weights, with figures and loading code."""

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from secateur.data.tokens import expanded
from secateur.families import find
from secateur.io.run_directory import write_whole
from secateur.io.safe_parse import HostileError, parse_yaml, read_bytes
from secateur.layers.integers import LIBRARY
from secateur.report.report import TIERS, Report, lines, summary, task_rows, told_when
from secateur.report.run_records import RECORD, Run
from secateur.utils.errors import InputError
from secateur.utils.naming import hub_id, short_name

CARD = "README.md"
MAX_BYTES = 2**20
PLAIN = r"[A-Za-z0-9][\w.-]*"  # of a name that stands in YAML as it is
#: auto class in transformers and, where the hub has one, the task
OPENERS = {
    "causal": ("AutoModelForCausalLM", "text-generation"),
    "masked": ("AutoModelForMaskedLM", "fill-mask"),
    "images": ("AutoModelForImageClassification", "image-classification"),
    "seq2seq": ("AutoModelForSeq2SeqLM", None),
}


def write_card(run: Run) -> Path:
    """Write the card of a finished run, and return its path."""
    path = run.folder / CARD
    write_whole(path, card(run.report, license_of(run.report["model"]["source"])))
    return path


def card(report: Report, license_name: str | None = None) -> str:
    """The card as text: YAML front matter for the hub, then Markdown.

    It contains only what is known: the base model if it was named by its hub id, and a license if
    the original's card names one. Perplexities are not in a ``model-index``, because their texts
    are not data sets of the hub.
    """
    head = yaml.safe_dump(front_matter(report, license_name), sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n\n" + "\n".join(body(report)).rstrip() + "\n"


def front_matter(report: Report, license_name: str | None) -> dict[str, Any]:
    """The metadata by which the hub sorts models."""
    base, task = base_model(report), opener(report)[1]
    methods = [step["method"]["name"] for step in report["steps"]] or [report["method"]["name"]]
    found: dict[str, Any] = {"library_name": "transformers"}
    if base is not None:
        found["base_model"] = base
        if LIBRARY in report["libraries"]:
            found["base_model_relation"] = "quantized"
    if task is not None:
        found["pipeline_tag"] = task
    if license_name is not None:
        found["license"] = license_name
    named = dict.fromkeys(name for name in methods if re.fullmatch(PLAIN, name))
    return found | {"tags": ["secateur", "compressed", *named]}


def base_model(report: Report) -> str | None:
    """The hub id of the dense model; None for a local folder."""
    source = report["model"]["source"]
    with suppress(OSError):  # no path, but it may be a name
        if Path(source).exists():
            return None
    return hub_id(source)


def opener(report: Report) -> tuple[str, str | None]:
    """The auto class that loads the model, and the hub's name of its task."""
    family = find(report["model"]["model_type"].removeprefix("secateur_"))
    return OPENERS["causal" if family is None else family.use]


def license_of(source: str) -> str | None:
    """The license in the original's card, if that is available locally; nothing is downloaded."""
    try:
        path = expanded(source) / CARD
        if not path.is_file():
            kept = try_to_load_from_cache(source, CARD)
            if not isinstance(kept, str):
                return None
            path = Path(kept)
        text = read_bytes(path, MAX_BYTES).decode("utf-8", "replace")
        found = re.match(r"\ufeff?---[ \t\r]*\n(.*?)\n---\s*(\n|$)", text, re.S)
        fields = parse_yaml(found[1].encode()) if found else None
    except (OSError, HFValidationError, InputError, HostileError):  # no path, or one that is gone
        return None
    name = fields.get("license") if isinstance(fields, dict) else None
    return name if isinstance(name, str) and re.fullmatch(PLAIN, name) else None


def body(report: Report) -> Iterator[str]:
    """The Markdown text, line by line."""
    name, base = short_name(report["model"]["source"]), base_model(report)
    of = f"[{base}](https://huggingface.co/{base})" if base else plain(name)
    yield f"# {plain(name)}, compressed"
    yield ""
    yield f"{of}, made smaller by Secateur {plain(report['versions'].get('secateur', ''))}. It"
    yield f"{plain(summary(report))}."
    yield ""
    yield "| | dense | compressed | change |"
    yield "|---|---:|---:|---:|"
    for line in lines(report):
        yield "| " + " | ".join(plain(cell) for cell in line) + " |"
    yield ""
    if tasks := task_rows(report):
        for row in (tasks[0], None, *tasks[1:]):
            cells = ["---" if row is None else plain(cell) for cell in row or tasks[0]]
            yield "| " + " | ".join(cells) + " |"
        yield ""
    yield f"{told_when(report)}. Another text or task may fare better or worse:"
    yield "measure what you need before you rely on it."
    yield ""
    yield "## Load it"
    yield ""
    yield from loading(report)
    yield ""
    yield "## How it was made"
    yield ""
    for step in report["steps"] or [report.content]:
        yield f"- {plain(_used(step))}"
    text = report["calibration"]
    if text:
        told = f"{text.get('samples')} × {text.get('length')} tokens of "
        told += f"{short_name(str(text.get('source')))}, seed {text.get('seed')}"
        yield f"- calibrated on {plain(told)}"
    told = ", ".join(f"{key} {value}" for key, value in report["versions"].items())
    yield f"- {plain(told)}"
    yield ""
    yield f"`{RECORD}/recipe.yaml` repeats it, `{RECORD}/report.html` has pictures and every unit."
    dense, small = report["dense"], report["compressed"]
    if dense["sample"] or small["sample"]:
        yield ""
        yield "## Samples"
        yield ""
        said = {"prompt": dense["prompt"], "dense": dense["sample"], "compressed": small["sample"]}
        yield from fenced("\n\n".join(f"{who}: {' '.join(s.split())}" for who, s in said.items()))


def loading(report: Report) -> Iterator[str]:
    """How to load a checkpoint of this tier."""
    auto = opener(report)[0]
    reader = "AutoImageProcessor" if report["dense"]["counts"] == "images" else "AutoTokenizer"
    name = "reader" if reader == "AutoImageProcessor" else "tokenizer"
    tier = report["tier"]
    yield f"Tier {tier}: {TIERS[tier]}." if tier in TIERS else f"Tier {plain(tier)}."
    yield "`THIS_MODEL` stands for this folder or repository."
    # to be typed into a shell: what is no plain name of a package is left out
    libraries = [name for name in report["libraries"] if re.fullmatch(PLAIN, name, re.ASCII)]
    if libraries:
        yield ""
        yield from fenced(f"pip install {' '.join(libraries)}", "sh")
    yield ""
    opened = [
        f"from transformers import {auto}, {reader}",
        "",
        f'{name} = {reader}.from_pretrained("THIS_MODEL")',
    ]
    if report["tier"] == "plain":
        yield from fenced(
            "\n".join([*opened, f'model = {auto}.from_pretrained("THIS_MODEL")']), "python"
        )
        return
    code = f'model = {auto}.from_pretrained("THIS_MODEL", trust_remote_code=True)'
    yield from fenced("\n".join([*opened, code]), "python")
    yield ""
    yield "The code that this runs lies beside the weights (`*_secateur.py`). With Secateur"
    yield "installed none of it is needed:"
    yield ""
    own = f'model = {auto}.from_pretrained("THIS_MODEL")'
    yield from fenced("\n".join(["import secateur", *opened, own]), "python")


def _used(step: dict[str, Any]) -> str:
    """A method and an allocator with their options, and the budget."""
    parts = []
    for key in ("method", "allocator"):
        if named := step.get(key):
            given = ", ".join(f"{k} {v}" for k, v in named.get("options", {}).items())
            parts.append(f"{key} {named['name']}" + (f" ({given})" if given else ""))
    budget = step.get("budget") or {}
    if budget:
        parts.append(f"keeps {budget['reached']:.2%} of {budget['of']}")
    return "; ".join(parts)


def plain(text: str) -> str:
    """Escape text for Markdown and HTML, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>|#&~])", r"\\\1", " ".join(str(text).split()))


def fenced(text: str, language: str = "") -> Iterator[str]:
    """A code block whose fence is longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    yield fence + language
    yield from text.splitlines()
    yield fence
