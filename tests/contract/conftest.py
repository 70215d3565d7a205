"""Written checkpoints of every family, read back by fresh processes once for all tests."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from secateur import Budget, Model, Plan, make_plan, score
from secateur.allocate.base import Evidence
from secateur.data.tasks import use_of
from secateur.data.tokens import Tokens
from secateur.methods import method_class, method_classes
from secateur.methods.base import Method
from secateur.models.model import anatomy_of
from secateur.pipeline.compress_stage import write
from secateur.pipeline.context import RunContext
from secateur.planning.planner import revise
from secateur.structure.units import DEPTH, MATRICES, STREAM, Unit
from tests.conftest import Calibrated
from tests.contract.reading import Job, Reader, Reading
from tests.support import met
from tests.support.covering import COST, parameters
from tests.support.families import AUTO, FAMILIES
from tests.support.steps import prepared_of

HERE = Path(__file__).parent

#: methods that narrow, of extensions too; those that keep widths have tests of their
#: own (test_forms.py)
NARROWING = [name for name, kind in method_classes().items() if kind.kinds != MATRICES]
#: the method that the fast run may hold against every variant; it holds each other one against one
EVERYWHERE = "auto"
#: who reads a checkpoint, and of which kind (see ``written``)
ROUTES = [
    ("stranger", "layered"),
    ("secateur", "mixed"),
    ("stranger", "gone"),
    ("secateur", "layered"),
    ("stranger", "mixed"),
    ("secateur", "gone"),
    ("stranger", "plain"),
]


#: what some methods do not reach on single variants: test, variant, method
WEAK = {
    ("test_measured_error_falls_with_size", "phi3", "ispasp"),
    ("test_measured_error_falls_with_size", "phi3_partial", "ispasp"),
    (
        "test_what_scores_keep_is_worth_more_than_what_they_remove",
        "falcon_multi_query",
        "flap",
    ),
    ("test_measured_error_beats_a_random_choice", "gpt2_scaled", "llm-pruner"),
}


@pytest.hookimpl(tryfirst=True)  # before the fast run's tests are chosen and markers looked at
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    own = {item: parameters(item) for item in items if HERE in item.path.parents}
    unserved = [
        i for i, asked in own.items() if not is_served(asked.get("method"), asked.get("name"))
    ]
    config.hook.pytest_deselected(items=unserved)
    gone = set(unserved)
    items[:] = [item for item in items if item not in gone]
    for item, asked in own.items():
        item.stash[COST] = cost(asked)
        test = getattr(item, "originalname", item.name)
        if (test, asked.get("name"), asked.get("method")) in WEAK:
            item.add_marker(pytest.mark.xfail(strict=True, reason="has failed since 0.3.0"))


def cost(asked: Mapping[str, Any]) -> int:
    """What a test costs the fast run: little where its checkpoint is there for other tests too."""
    method, name = asked.get("method"), asked.get("name")
    if method is None or name is None:
        return 0
    if (method, name) not in pairs():
        return 2
    route, kind = pairs()[method, name]
    return int(asked.get("route", route) != route or asked.get("kind", kind) != kind)


@cache
def pairs() -> dict[tuple[str, str], tuple[str, str]]:
    """Methods and variants that the fast run brings together, each by a route and a kind.

    One method meets all variants, the others one each. These go through the variants in turn, so
    that unlike methods meet unlike families.
    """
    found, names = [], list(FAMILIES)
    for method in NARROWING:
        name = next(name for name in names if is_served(method, name))
        found.append((method, name))
        names.remove(name)
        names.append(name)
    found += [(EVERYWHERE, name) for name in names if (EVERYWHERE, name) not in found]
    return dict(zip(found, cycle(ROUTES), strict=False))


@cache
def is_served(method: str | None, name: str | None) -> bool:
    """Whether a method can change anything in a variant."""
    if method is None or name is None:
        return True
    return method_class(method.partition(" ")[0])().obstacle(shapes(name)) is None


@cache
def shapes(name: str) -> Model:
    """A variant without storage, as it is looked at before any weight is read."""
    config: Any = open_config(name)
    with torch.device("meta"):
        module = FAMILIES[name].auto.from_config(config)
    nothing: Any = None
    return Model(name, module, nothing, torch.float32, anatomy_of(config))


def open_config(name: str) -> Any:
    return getattr(transformers, FAMILIES[name].config)(**FAMILIES[name].options)


def methods(applies: Callable[[type[Method]], bool]) -> Any:
    """The test is for methods to which something applies."""
    names = [name for name in NARROWING if applies(method_class(name))]
    return pytest.mark.parametrize("method", names, indirect=True)


def by_blocks() -> Any:
    """The test is for methods whose units each belong to one block."""
    return methods(lambda method: method.kinds != STREAM)


def by_widths() -> Any:
    """The test is for methods that narrow what is inside blocks."""
    return methods(lambda method: method.kinds not in (STREAM, DEPTH))


def narrowing(kind: str) -> Any:
    """The test is for methods that narrow this kind of units."""
    return methods(lambda method: kind in method.kinds)


@dataclass(frozen=True)
class Written:
    """A checkpoint, its plan, and what the model in memory said of a row when it was written."""

    folder: Path
    plan: Plan
    tokens: Tokens
    memory: dict[str, Tensor]


@pytest.fixture(scope="session", params=NARROWING)
def method(request: pytest.FixtureRequest) -> type[Method]:
    return method_class(request.param)


@pytest.fixture(scope="session")
def stock(dense: Callable[[str], Path]) -> Callable[[str], Any]:
    """Variant name to the stock model in float64; hooks must be taken off again."""

    @cache
    def load(name: str) -> Any:
        model = FAMILIES[name].auto.from_pretrained(dense(name)).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.data = parameter.data.double()
        return model

    return load


@pytest.fixture(scope="session")
def scored(
    opened: Callable[..., Model], calibrated: Callable[[str], Calibrated]
) -> Callable[..., Evidence]:
    """What a method's calibration says about a variant."""

    @cache
    def evidence(name: str, method: type[Method]) -> Evidence:
        data = calibrated(name)
        return score(opened(name), method(), data.store, data.tokens)

    return evidence


@pytest.fixture(scope="session")
def planned(
    calibrated: Callable[[str], Calibrated], scored: Callable[..., Evidence]
) -> Callable[..., Plan]:
    """A plan for an open model."""

    def plan(
        model: Model, name: str, method: Method, multiple_of: int = 8, keep: float | None = None
    ) -> Plan:
        data, evidence = calibrated(name), scored(name, type(method))
        budget = Budget(keep=keep, target="parameters", multiple_of=multiple_of)
        spends = method.allocator
        if hasattr(spends, "steps"):  # of a search: a few serve as well here
            spends = replace(spends, steps=8)
        return make_plan(
            model,
            method,
            evidence,
            data.record,
            data.tokens,
            budget=budget,
            allocator=spends,
            store=data.store,
        )

    return plan


def resized(plan: Plan, model: Model, evidence: Evidence, sizes: dict[str, int]) -> Plan:
    """The plan with some sizes edited by hand."""
    rows = tuple(r.model_copy(update={"after": sizes.get(r.unit, r.before)}) for r in plan.units)
    plan = plan.model_copy(update={"units": rows})
    return revise(plan, model, plan.build_method(), evidence)


def sizes_of(kind: str, units: dict[str, Unit]) -> dict[str, int]:
    """Hand-made sizes of those of ``units`` that don't stay as they are."""
    if kind == "plain":
        wanted = {f"layers.{i}.mlp": 40 for i in range(3)} | {"layers.1.block": 0}
    elif kind == "gone":  # the scores of one block, the attention of another, an MLP
        wanted = {
            "layers.0.query_key": 0,
            "layers.0.heads": 1,
            "layers.1.query_key": 0,
            "layers.1.value_output": 0,
            "layers.1.heads": 0,
            "layers.2.mlp": 0,
            "layers.0.block": 0,
            "layers.2.block": 0,
            "residual": 8,
        }
    else:
        wanted = {
            "layers.1.mlp": 24,
            "layers.1.query_key": 4,
            "layers.1.heads": 1,
            "layers.2.mlp": 48,
            "layers.2.value_output": 3,
            "layers.2.block": 0,
            "residual": 16,
        }
        if (heads := units.get("layers.2.heads")) is not None:
            wanted[heads.name] = heads.size - 1
    return {name: max(size, units[name].least) for name, size in wanted.items() if name in units}


def for_stock_classes(method: type[Method]) -> Method:
    """The method without biases that stock classes may have no place for."""
    if method().biased:
        assert "compensate" in {field.name for field in fields(method)}
        return method(compensate=0)
    return method()


@pytest.fixture(scope="session")
def write_to(
    opened: Callable[..., Model],
    calibrated: Callable[[str], Calibrated],
    planned: Callable[..., Plan],
    scored: Callable[..., Evidence],
) -> Callable[..., Written]:
    """Compress a variant into a folder, by hand-made sizes or as the method plans."""

    def make(folder: Path, method: type[Method], name: str, kind: str) -> Written:
        model, data = opened(name), calibrated(name)
        made = for_stock_classes(method) if kind == "plain" else method()
        plan = planned(model, name, made, keep=1.0 if kind == "full" else 0.7)
        if kind in ("plain", "mixed", "gone"):
            sizes = sizes_of(kind, {unit.name: unit for unit in made.units(model, 8)})
            plan = resized(plan, model, scored(name, method), sizes)
        memory, tokens = write(prepared_of(model, data, plan), folder, RunContext())
        met.note_written(model, plan)
        return Written(folder, plan, tokens, memory)

    return make


@pytest.fixture(scope="session")
def written(
    tmp_path_factory: pytest.TempPathFactory,
    write_to: Callable[..., Written],
    method: type[Method],
) -> Callable[[str, str], Written]:
    """Variant and kind to a written checkpoint: "full" is keep 1, "plain" one MLP width, "layered"
    what the method plans for 0.7, "mixed" differs in every block, "gone" lacks whole units."""
    root = tmp_path_factory.mktemp(method.name)

    @cache
    def checkpoint(name: str, kind: str) -> Written:
        return write_to(root / f"{name}-{kind}", method, name, kind)

    return checkpoint


@pytest.fixture(scope="session")
def readers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Reader]]:
    """Route to what reads on it."""
    started = cache(lambda route: Reader(route, tmp_path_factory.mktemp(route)))
    yield started
    for route in ("secateur", "stranger"):
        started(route).close()


@pytest.fixture(scope="session")
def readings(
    readers: Callable[[str], Reader],
    written: Callable[[str, str], Written],
    method: type[Method],
) -> Callable[[str], Callable[[str, str], Reading]]:
    """Route to a look-up by variant and kind of what a fresh process finds there."""

    @cache
    def read(route: str, name: str, kind: str) -> Reading:
        made = written(name, kind)
        job = Job(made.folder, AUTO[FAMILIES[name].use], asked_with(name, made.tokens))
        return readers(route).read({f"{name}/{kind}": job})[f"{name}/{kind}"]

    return lambda route: partial(read, route)


def asked_with(name: str, tokens: Tokens) -> dict[str, Tensor]:
    """A row as the arguments of a forward with a loss."""
    asked = use_of(open_config(name)).inputs(tokens)
    labels = tokens.ids if tokens.labels is None else tokens.labels
    return {k: v for k, v in asked.items() if isinstance(v, Tensor)} | {"labels": labels.clone()}


ROUNDING = 5e-5  # of float32 logits, in units of their spread


def spread(found: Tensor, expected: Tensor) -> float:
    """Largest difference, in units of the expected numbers' spread."""
    return float((found.double() - expected.double()).abs().max() / expected.double().std())


def logits(model: Any, given: Tokens | Tensor) -> Tensor:
    """What a transformers model says, of token ids if it is a causal one."""
    if isinstance(given, Tensor):
        given = Tokens(given, torch.ones_like(given, dtype=torch.bool))
    with torch.inference_mode():
        return model(**use_of(model.config).inputs(given)).logits


def states(model: Any, given: Tokens) -> Tensor:
    """What its body says."""
    with torch.inference_mode():
        return model.base_model(**use_of(model.config).inputs(given)).last_hidden_state
