"""What reads files of others, each through the function that the command line calls."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from secateur import Budget, Calibration, Settings, Store, calibrate, make_plan, open_model, score
from secateur.allocate.knapsack import Knapsack
from secateur.apply.block_journal import Journal
from secateur.apply.save import store_block
from secateur.apply.sequential import narrow_blocks
from secateur.calibration.needs import Needs
from secateur.cli.render import inspection
from secateur.data.tokens import read_documents
from secateur.evaluate.task_file import read_task
from secateur.io.run_directory import FINGERPRINT, Workspace
from secateur.io.safetensors_header import read_header, tensors
from secateur.io.safetensors_writer import Writer
from secateur.methods import check_served, method_class
from secateur.methods.auto import Auto
from secateur.models.loading import skeleton
from secateur.models.model import Model
from secateur.pipeline.compress_stage import write
from secateur.pipeline.context import RunContext
from secateur.pipeline.prepare import check_reach
from secateur.planning.checks import match_units
from secateur.planning.plan import read_plan
from secateur.planning.recipe import Recipe, Step, read_recipe
from secateur.report.frontier_table import compare
from secateur.report.html import rendered
from secateur.report.html.content import content
from secateur.report.hub import check_whole
from secateur.report.model_card import card
from secateur.report.run_records import read_run
from secateur.scoring.evidence import identity, keep_evidence, kept_evidence
from secateur.structure.costs import counted
from secateur.sweeps.folder import Folder
from secateur.sweeps.grid import read_sweep
from secateur.utils.errors import HaltedError, InputError
from tests.fuzz.mutations import as_yaml, mutated, numbers, weight_file
from tests.support import families
from tests.support.made_runs import REPORT, UNITS, made_run
from tests.support.steps import prepared_of

CPU = Settings(device="cpu", dtype="float32")
#: families whose configs are mutated; one of each kind of layout
CONFIGS = ("llama", "gpt2", "gemma2", "cohere2", "falcon", "gpt_neox", "t5", "bert", "vit")
COMPRESSED = ("modegpt", "svd-llm", "flap")
WEIGHTS = "model.safetensors"
ASKED = {
    **{"secateur": "1", "libraries": {"torch": "2"}, "model": "a/b", "files": {"a": [1, 2]}},
    **{"calibration": {"source": "x", "seed": 0, "windows": []}, "settings": {"device": "cpu"}},
}


@dataclass(frozen=True)
class Target:
    """A kind of file.

    Attributes:
        file: where it lies in the room that strangers have written.
        made: a new content of it.
        read: what reads it; ``InputError`` is all that it may raise.
    """

    file: Path
    made: Callable[[Random], bytes]
    read: Callable[[], Any]

    def once(self, chance: Random) -> None:
        """Write a case and read it."""
        self.file.write_bytes(self.made(chance))
        self.read()


class Targets:
    """Everything made once: models, and valid files of every kind, in an empty folder."""

    def __init__(self, room: Path) -> None:
        self.room = room

    @cached_property
    def dense(self) -> Path:
        return families.save(families.random_model("llama"), self.room / "dense")

    @cached_property
    def shapes(self) -> Model:
        return skeleton(str(self.dense), CPU)

    @cached_property
    def tokens(self) -> Any:
        return families.read("llama", 4, 32)

    @cached_property
    def store(self) -> Store:
        needs: frozenset[Any] = frozenset()
        for method in (Auto(), *(method_class(name)() for name in COMPRESSED)):
            needs |= method.needs | method.allocator.needs
        store = Store()
        calibrate(open_model(self.dense, CPU), self.tokens, needs, store)
        return store

    @cached_property
    def plans(self) -> dict[str, Any]:
        """A plan of each of a few methods."""
        found = {}
        for name in COMPRESSED:
            options = {"rank_step": 2} if name == "svd-llm" else {}
            method = method_class(name)(**options)
            model = open_model(self.dense, CPU)
            evidence = score(model, method, self.store, self.tokens)
            given = (evidence, Calibration("text.txt", 4, 32), self.tokens)
            budget = Budget(keep=0.8, multiple_of=4)
            found[name] = make_plan(model, method, *given, budget=budget)
        return found

    def compressed(self, name: str) -> Path:
        """The checkpoint of such a plan."""
        folder = self.room / f"small-{name}"
        if not folder.exists():
            model, plan = open_model(self.dense, CPU), self.plans[name]
            write(prepared_of(model, self, plan), folder, RunContext())
        return folder

    @cached_property
    def all(self) -> dict[str, Callable[[], Target]]:
        """Targets by name, made when they are wanted."""
        return {
            "plan": self.plan,
            "recipe": self.recipe,
            "config": self.config,
            "checkpoint config": self.checkpoint_config,
            "weight header": self.header,
            "weights": self.weights,
            "index": self.index,
            "report": self.report,
            "run's plan": self.run_plan,
            "scores": self.scores,
            "statistics": self.statistics,
            "block's statistics": self.block_statistics,
            "sweep": self.sweep,
            "unfinished run": self.unfinished,
            "shared by runs": self.shared,
            "journal": self.journal,
            "task file": self.task,
            "text lines": self.lines,
        }

    def plan(self) -> Target:
        seeds = [json.loads(plan.to_json()) for plan in self.plans.values()]
        file = self.room / "plan.json"

        def read() -> None:
            plan = read_plan(file)
            method, step = plan.build_method(), plan.build_step()
            plan.calibration.choice()
            match_units(plan, self.shapes, method)
            check_served(method, self.shapes)
            step.units(self.shapes)
            plan.to_json(), plan.densified, plan.libraries, plan.predicted_loss

        return Target(file, lambda chance: mutated(seeds, chance), read)

    def recipe(self) -> Target:
        steps = [
            Step.of(method_class("modegpt")(), Budget(keep=0.9, multiple_of=2)),
            Step.of(method_class("svd-llm")(rank_step=2)),
            Step.of(method_class("gptq")()),
        ]
        short = {"keep": 0.5, "steps": [{"method": "flap", "options": {"compensate": 0}}]}
        whole = {"version": 3, "model": "a/b", "keep": 0.8, "steps": [s.as_dict() for s in steps]}
        asked = {"calibration": {"source": "x"}, "evaluate": {"texts": []}, "settings": {}}
        file = self.room / "recipe.yaml"
        seeds = [short, whole, whole | asked]

        def read() -> None:
            for step in read_recipe(file).steps:
                check_reach(self.shapes, step)

        Recipe(tuple(steps), 0.8)
        return Target(file, lambda chance: mutated(seeds, chance, as_yaml), read)

    def _inspected(self, folder: Path, configs: list[Any]) -> Target:
        def read() -> None:
            inspection(str(folder), CPU, 8)

        return Target(folder / "config.json", lambda chance: mutated(configs, chance), read)

    def config(self) -> Target:
        """Of stock checkpoints; with the weights of one of them beside it, half of the time."""
        configs = []
        for name in CONFIGS:
            source = families.save(families.random_model(name), self.room / f"config-{name}")
            configs.append(json.loads((source / "config.json").read_text()))
        folder = self.room / "config"
        folder.mkdir()
        target = self._inspected(folder, configs)

        def made(chance: Random) -> bytes:
            (folder / WEIGHTS).unlink(missing_ok=True)
            if chance.random() < 0.5:
                os.link(self.dense / WEIGHTS, folder / WEIGHTS)
            return target.made(chance)

        return Target(target.file, made, target.read)

    def checkpoint_config(self) -> Target:
        """Of compressed checkpoints, whose layers have shapes and forms of their own."""
        sources = [self.compressed(name) for name in COMPRESSED]
        configs = [json.loads((source / "config.json").read_text()) for source in sources]
        folder = Path(shutil.copytree(sources[1], self.room / "checkpoint"))
        return self._inspected(folder, configs)

    def header(self) -> Target:
        """Of weight files, by themselves."""
        seeds = [self.parts(self.dense / WEIGHTS), self.parts(self.compressed("svd-llm") / WEIGHTS)]
        file = self.room / "header" / WEIGHTS
        file.parent.mkdir()
        return Target(file, lambda chance: weight_file(seeds, chance), lambda: read_header(file))

    @staticmethod
    def parts(path: Path) -> tuple[Any, bytes]:
        raw = path.read_bytes()
        behind = 8 + int.from_bytes(raw[:8], "little")
        return json.loads(raw[8:behind]), raw[behind:]

    def weights(self) -> Target:
        """Config or weight file of a checkpoint that is then opened with all its numbers."""
        source = self.compressed("svd-llm")
        folder = Path(shutil.copytree(source, self.room / "opened"))
        header, config = self.parts(source / WEIGHTS), (source / "config.json").read_bytes()
        whole = (source / WEIGHTS).read_bytes()

        def made(chance: Random) -> bytes:
            changes = chance.random() < 0.5
            told = mutated([json.loads(config)], chance) if changes else config
            (folder / "config.json").write_bytes(told)
            return whole if changes else weight_file([header], chance)

        def read() -> None:
            open_model(folder, CPU)

        return Target(folder / WEIGHTS, made, read)

    def index(self) -> Target:
        """Which file a tensor is in."""
        folder = self.room / "sharded"
        writer = Writer(folder, 20_000)
        for name, tensor in open_model(self.dense, CPU).module.state_dict().items():
            writer.add(name, tensor.clone())
        writer.finish()
        made_run(self.room / "for index")
        shutil.copytree(self.room / "for index" / "secateur", folder / "secateur")
        for name in ("config.json", "README.md"):
            (folder / name).write_text("{}")
        file = folder / f"{WEIGHTS}.index.json"
        seeds = [json.loads(file.read_text())]

        def read() -> None:
            tensors(folder)
            check_whole(folder)

        return Target(file, lambda chance: mutated(seeds, chance), read)

    def _shown(self, folder: Path) -> Callable[[], None]:
        other = made_run(folder.parent / f"{folder.name} other")

        def read() -> None:
            run = read_run(folder)
            rendered(content(run, None))
            card(run.report)
            rendered(content(run, compare([folder, other])))

        return read

    def report(self) -> Target:
        folder = made_run(self.room / "run")
        damage = {"damage": {"confidence": {"error": 0.1, "gap": 0.2, "outputs": 64}}}
        task = {"task_scores": {"t": {"items": 9, "chance": 0.25, "acc": 0.5, "acc_stderr": 0.1}}}
        sides = {side: REPORT[side] | damage | task for side in ("dense", "compressed")}
        change = {"difference": -0.1, "stderr": 0.1, "flipped": 2, "to_wrong": 1, "to_right": 1}
        sides["compressed"]["task_changes"] = {"t": change}
        step = {key: REPORT[key] for key in ("method", "allocator", "budget")}
        seeds = [REPORT, REPORT | sides, REPORT | {"steps": [step, step]}]
        file = folder / "secateur" / "report.json"
        return Target(file, lambda chance: mutated(seeds, chance), self._shown(folder))

    def run_plan(self) -> Target:
        """The plan of a finished run, of which only the page takes notice."""
        folder = made_run(self.room / "run of plan")
        seeds = [
            {"version": 2, "units": UNITS},
            *(json.loads(p.to_json()) for p in self.plans.values()),
        ]
        file = folder / "secateur" / "plan.json"
        return Target(file, lambda chance: mutated(seeds, chance), self._shown(folder))

    def scores(self) -> Target:
        model = open_model(self.dense, CPU)
        method, file = Auto(), self.room / "scores.json"
        own, units = identity(model, method, self.tokens, Knapsack()), method.units(model, 1)
        prices = counted(units, "parameters", 4)
        keep_evidence(own, score(model, method, self.store, self.tokens), file)
        seeds = [json.loads(file.read_text())]

        def read() -> None:
            found = kept_evidence(own, units, file)
            assert found is not None
            Knapsack().allocate(units, found, prices, 0.8)

        return Target(file, lambda chance: mutated(seeds, chance), read)

    def statistics(self) -> Target:
        """What a folder of statistics says that they are of."""
        folder = self.room / "statistics"
        own = {"secateur": "1", "model": "a" * 16, "calibration": "b" * 16, "dtype": "float32"}
        Store(folder).claim(own, Auto().needs)
        file = folder / "identity.json"
        seeds = [json.loads(file.read_text())]
        return Target(
            file, lambda c: mutated(seeds, c), lambda: Store(folder).claim(own, Auto().needs)
        )

    def block_statistics(self) -> Target:
        """The sums of a block: header, shapes and numbers; what is solved from them."""
        methods = [Auto(), *(method_class(name)() for name in COMPRESSED)]
        needs = frozenset[Any]().union(*(m.needs | m.allocator.needs for m in methods))
        folder, own, model = self.room / "sums", {"model": "a" * 16}, open_model(self.dense, CPU)
        Store(folder).claim(own, needs)
        block = model.blocks[0]
        Store(folder).put(0, self.store.get(0, needs | {Needs.INFLUENCE}))
        file = folder / "block-00000.safetensors"
        whole, seeds = file.read_bytes(), [self.parts(file)]
        Store(folder).claim(own, needs, [block])

        def made(chance: Random) -> bytes:
            return numbers(whole, chance) if chance.random() < 0.5 else weight_file(seeds, chance)

        def read() -> None:
            store = Store(folder)
            store.claim(own, needs, [block])
            if 0 not in store:
                raise InputError("it is measured again")
            for method in methods:
                found = store.get(0, method.needs)
                for unit in method.units(model, 8):
                    if unit.block == 0:
                        method.solve(unit, block, found)

        return Target(file, made, read)

    def sweep(self) -> Target:
        """What a sweep asks for."""
        recipe = self.room / "asked for.yaml"
        recipe.write_text("keep: 0.5\nsteps: [{method: auto}, {method: gptq}]")
        options = {"iterations": [0, 10], "ridge": 0.01}
        runs = [
            {"method": ["auto", "flap"], "tier": ["plain", "per-layer"]},
            {"method": "auto", "options": options, "allocator": ["knapsack", "uniform"]},
            {"method": "gptq", "keep": None, "options": {"bits": ["4", "8"]}, "name": "whole"},
            {"recipe": str(recipe), "keep": [0.3, 0.2]},
            {"steps": [{"method": "auto", "keep": 0.9}, {"method": "rtn"}], "keep": None},
        ]
        beside = {
            "calibration": {"source": "a.txt", "samples": 4, "length": 32, "seed": 1},
            "evaluate": {"texts": ["b.txt"], "windows": 2, "speed": False},
            "settings": {"device": "cpu", "stream": "off"},
        }
        few = {"version": 1, "model": "a/b", "keep": [0.9, 0.8]}
        seeds = [few | {"runs": runs}, few | beside | {"runs": runs[:1]}]
        file = self.room / "sweep.yaml"

        def read() -> None:
            record = read_sweep(file)
            record.asked(), record.options()

        return Target(file, lambda chance: mutated(seeds, chance, as_yaml), read)

    def unfinished(self) -> Target:
        """What an unfinished run says that it is about."""
        workspace, own = Workspace(self.room / "run to be", overwrite=False), {**ASKED}
        file = workspace.folder / FINGERPRINT
        file.parent.mkdir()

        def read() -> None:
            with workspace.opened(own):
                raise HaltedError("it stays")

        def looked_at() -> None:
            with suppress(HaltedError):
                read()

        return Target(file, lambda chance: mutated([own], chance), looked_at)

    def shared(self) -> Target:
        """What the runs of a sweep have in common."""
        folder = Folder(self.room / "sweep")
        file = folder.shared / "asked.json"
        file.parent.mkdir(parents=True)
        return Target(
            file, lambda chance: mutated([ASKED], chance), lambda: folder.check({**ASKED})
        )

    def journal(self) -> Target:
        """What a killed run has noted; beside it lies what it has written."""
        templates = {}
        for name in ("modegpt", "svd-llm"):
            model, plan, there = open_model(self.dense, CPU), self.plans[name], self.room / name
            there.mkdir()
            writer = Writer(there / "result")
            journal, method = Journal(there / "narrowing", writer, plan.sizes), plan.build_method()
            units = plan.build_step().units(model)
            given = (method, units, plan.sizes, self.tokens, self.store)
            for block in islice(narrow_blocks(model, *given, journal), 2):
                store_block(model, block, writer)
                journal.record(block)
            templates[name] = there
        seeds = {
            n: json.loads((t / "narrowing/journal.json").read_text()) for n, t in templates.items()
        }
        file, folder, chosen = self.room / "journal.json", self.room / "narrowed", ["modegpt"]

        def made(chance: Random) -> bytes:
            chosen[0] = chance.choice([*templates])
            return mutated([seeds[chosen[0]], *seeds.values()], chance)

        def read() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(templates[chosen[0]], folder)
            shutil.copy(file, folder / "narrowing" / "journal.json")
            model = open_model(self.dense, CPU)
            writer = Writer(folder / "result")
            journal = Journal(folder / "narrowing", writer, self.plans[chosen[0]].sizes)
            if not journal.done:
                raise InputError("it starts again")
            for block in model.blocks[: journal.done]:
                journal.restore(model, block)
            assert not any(p.is_meta for p in model.module.parameters())

        return Target(file, made, read)

    def task(self) -> Target:
        file = self.room / "task.jsonl"
        seeds = [
            {"query": "a", "choices": ["b", "c"], "gold": 1},
            {"context_options": ["a", "b"], "continuation": "c", "gold": 0},
            {"context": "a", "continuation": "b"},
        ]

        def made(chance: Random) -> bytes:
            return b"\n".join(mutated(seeds, chance) for _ in range(chance.choice((1, 2, 5))))

        return Target(file, made, lambda: read_task(str(file)))

    def lines(self) -> Target:
        file = self.room / "text.jsonl"
        seeds = [{"text": "some words"}, {"text": "", "also": [1, {"a": None}]}]

        def made(chance: Random) -> bytes:
            return b"\n".join(mutated(seeds, chance) for _ in range(chance.choice((1, 2, 5))))

        return Target(file, made, lambda: read_documents(str(file)))
