"""Write docs/families.md from the variants of the contract tests: python -m scripts.docs.families

Every variant is built without storage and every method asked whether it can serve it, as the
contract tests ask before they run.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from scripts.docs.markdown import table
from secateur import families as anatomies
from secateur.families import Anatomy
from secateur.methods import METHODS, method_class
from secateur.methods.base import Method
from secateur.methods.step import Step
from secateur.models.model import Model, anatomy_of
from secateur.pipeline.prepare import check_reach
from secateur.structure.budget import Budget
from secateur.utils.errors import InputError
from tests.families.test_families import MORE
from tests.support.families import FAMILIES, Family

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
#: sizes of the tiny variants, and how much larger they are made, so that default options fit
SIZES = ("hidden_size", "intermediate_size", "ffn_dim", "ffn_hidden_size", "word_embed_proj_dim")
SIZES += ("head_dim", "n_embd", "n_inner", "d_model", "d_ff", "d_kv")
LARGER = 4
AXES = {
    "mlp": "MLP channels",
    "query_key": "queries, keys",
    "value_output": "values",
    "heads": "KV heads",
    "residual": "residual stream",
    "block": "blocks",
}
HEAD = """\
# Model families

This page says what each method can prune in each model family. `python -m scripts.docs.families`
generates it from the variants that the contract tests run on, so do not edit it. It shows what
`secateur` answers for a model of the family that is wide enough for the default options.

`tests/contract` compares methods with the dense model on these variants. `make test-all` runs every
method on every variant; `make test` meets each method and each variant, but not every pair.
`secateur inspect MODEL` says what can be pruned in one model and needs no weights. The
[README](../README.md#which-models) lists configs that are not supported.

## What can be pruned

✓ can be pruned, – cannot be pruned, (✓) depends on the config. "Grouped" attention can also have as
many KV heads as query heads, or a single one. In every family, weight matrices can be quantized,
sparsified or factorized.

"""


Refused = dict[tuple[str, str], str | None]


@dataclass(frozen=True)
class Served:
    """A variant without storage: its family by name, and what its model is."""

    label: str
    model: Model


def variants() -> list[Served]:
    """Those of the contract tests and those beside them, in the order of the families."""
    more = {
        name: replace(FAMILIES[like], config=config, options=FAMILIES[like].options | options)
        for name, (like, config, options) in MORE.items()
    }
    built = [shapes(name, family) for name, family in (FAMILIES | more).items()]
    return sorted(built, key=lambda one: ORDER.index(one.label))


def shapes(name: str, family: Family) -> Served:
    """A variant as it is looked at before any weight is read, but larger."""
    options = {k: LARGER * v if k in SIZES else v for k, v in family.options.items()}
    config: Any = getattr(transformers, family.config)(**options)
    with torch.device("meta"):
        module = family.auto.from_config(config)
    nothing: Any = None
    model = Model(name, module, nothing, torch.float32, anatomy_of(config))
    assert model.anatomy is not None
    return Served(label(model.anatomy, config.model_type), model)


def label(anatomy: Anatomy, model_type: str) -> str:
    """The name of a family; of its part, where one name stands for each ``model_type``."""
    names, types = anatomy.family.split(" / "), anatomy.model_types
    same = len(names) == len(types) > 1
    return names[types.index(model_type)] if same else anatomy.family


ORDER = [label(one, kind) for one in anatomies.FAMILIES for kind in one.model_types]


def page() -> str:
    """The whole page."""
    built = variants()
    methods = [method_class(name)() for name in METHODS]
    refused = asked(built, methods)
    return (
        HEAD + shrinking(built) + "\n## Which method supports which family\n\n"
        "With `--tier plain`, stock classes load the result. Without it, the plan determines the\n"
        "[tier](checkpoint-format.md#tiers). The table uses the default options of the methods.\n"
        "`flap --compensate 0` adds no biases and supports all families that `wanda-sp` does.\n\n"
        + serving(built, methods, refused)
        + "\n## Reasons\n\n"
        + reasons(built, refused)
    )


def asked(built: list[Served], methods: list[Method]) -> Refused:
    """Why a method can change nothing in a variant, or None."""
    return {
        (one.model.source, method.name): method.obstacle(one.model)
        for one in built
        for method in methods
    }


def shrinking(built: list[Served]) -> str:
    """A row a family and ``model_type``."""
    rows = []
    for label in dict.fromkeys(one.label for one in built):
        own = [one.model for one in built if one.label == label]
        rows.append(
            [
                label,
                f"`{own[0].config.model_type}`",
                *(mark([can_shrink(model, axis) for model in own]) for axis in AXES),
                attention(own),
                f"`{type(own[0].module).__name__}`",
            ]
        )
    return table(["family", "`model_type`", *AXES.values(), "attention", "class"], rows)


def can_shrink(model: Model, axis: str) -> bool:
    """Whether an axis has another size than today's in any block."""
    return any(not unit.fixed for unit in model.units(1, (axis,)))


def attention(models: list[Model]) -> str:
    """What is special about the attention of a family, in words."""
    model = models[0]
    anatomy, config = model.anatomy, model.config
    assert anatomy is not None
    layouts = [one.blocks[0].layout for one in models]
    grouped = any(layout.kv_heads < layout.heads for layout in layouts)
    words = ["grouped" if grouped else "multi-head"]
    if anatomy.rotary:
        part = mark(layout.rotary < layout.width for layout in layouts)
        words.append({"✓": "partly rotary", "–": "rotary", "(✓)": "rotary or partly"}[part])
    if anatomy.position_bias:
        words.append("position bias")
    if getattr(config, "layer_types", None) and "sliding_attention" in config.layer_types:
        words.append("windows")
    elif getattr(config, "sliding_window", None):
        words.append("window")
    if anatomy.soft_cap:
        words.append("soft cap")
    pairs = mark(can_shrink(one, "query_key") for one in models)
    words += {"✓": [], "–": ["norms inside heads"], "(✓)": ["in some configs norms inside heads"]}[
        pairs
    ]
    if anatomy.decoder is not None:
        words.append("cross-attention")
    return ", ".join(words)


def mark(answers: Iterable[bool]) -> str:
    """✓ where all are true, – where none is."""
    known = set(answers)
    return "(✓)" if len(known) > 1 else "✓" if known == {True} else "–"


def serving(built: list[Served], methods: list[Method], refused: Refused) -> str:
    """A row a method."""
    labels = list(dict.fromkeys(one.label for one in built))
    rows = []
    for method in methods:
        by = {
            label: mark(
                refused[one.model.source, method.name] is None
                for one in built
                if one.label == label
            )
            for label in labels
        }
        plain = {
            label: mark(
                refused[one.model.source, method.name] is None and goes_plain(method, one.model)
                for one in built
                if one.label == label
            )
            for label in labels
        }
        rows.append([f"`{method.name}`", ", ".join(kinds(method)), families(by), families(plain)])
    return table(["method", "works on", "supports", "`--tier plain`"], rows)


def kinds(method: Method) -> list[str]:
    """The axes of a method, in words."""
    return [AXES.get(kind, "matrices") for kind in method.kinds]


def goes_plain(method: Method, model: Model) -> bool:
    """Whether ``--tier plain`` is refused before any weight is read."""
    try:
        check_reach(model, Step.of(method, Budget(tier="plain")))
    except InputError:
        return False
    return True


def families(marks: dict[str, str]) -> str:
    """Labels by their marks, as few words as can be."""
    able = [label for label, found in marks.items() if found == "✓"]
    some = [label for label, found in marks.items() if found == "(✓)"]
    unable = [label for label, found in marks.items() if found == "–"]
    if not able and not some:
        return "none"
    if len(unable) + len(some) <= len(able):
        but = [*unable, *(f"some {label}" for label in some)]
        return f"all but {', '.join(but)}" if but else "all"
    return ", ".join([*able, *(f"some {label}" for label in some)])


def reasons(built: list[Served], refused: Refused) -> str:
    """Every obstacle once, with whom it is in the way of."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    for one in built:
        for axis in AXES:
            for reason in one.model.obstacles_of((axis,)):
                found.setdefault(reason, ([], []))[0].append(one.label)
        for name in METHODS:
            reason = refused[one.model.source, name]
            for part in reason.split("; ") if reason else ():
                if part in found:
                    found[part][1].append(f"`{name}`")
    lines = []
    for reason, (labels, methods) in found.items():
        lines.append(f"- {reason[0].upper()}{reason[1:]}.")
        lines.append(f"  {', '.join(dict.fromkeys(labels))}.")
        if methods:
            lines.append(f"  Affects {', '.join(dict.fromkeys(methods))}.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
