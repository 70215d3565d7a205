"""Scores of tasks: what is read, what is scored, and that the harness gives the same numbers."""

import io
import json
import math
from dataclasses import replace

import pytest
import torch

from secateur import InputError, Settings, open_model
from secateur.evaluate.likelihood import Pair, encoded, likelihoods
from secateur.evaluate.significance import (
    Answers,
    at_chance,
    changes,
    doubts,
    points,
    standard_error,
    within_error,
)
from secateur.evaluate.task_file import answered_file, read_task
from secateur.report import task_tables as outcome
from secateur.report.report import Report, comparison, task_rows
from secateur.utils.progress import Bars
from tests.support.made_runs import report as made_report
from tests.support.steps import step_of

CHOICES = [
    {"query": "The function returns", "choices": ["a list.", "None if x.", "the"], "gold": 0},
    {"query": "Question: what is a module\n", "choices": ["A file of code.", "It is"], "gold": 1},
    {"query": "A string  ", "choices": ["is immutable", "é"], "gold": 0, "ind": 3},
    {"query": "", "choices": ["The object is", "sequence"], "gold": 0},
    {"query": "Raise an", "choices": ["exception", "error if the argument is bad"], "gold": 0},
    {"query": "Return the number " + 300 * "of the ", "choices": ["items", "x y"], "gold": 1},
]
CONTINUATIONS = [
    {"context": "This method returns the value of", "continuation": "the"},
    {"context": "If the", "continuation": "argument is"},
    {"context": "Return a new", "continuation": "zebra"},
]
OPTIONS = [
    {"context_options": ["The list so", "The tuple so"], "continuation": "it is sorted", "gold": 0},
    {"context_options": ["A file", "A class", "A method"], "continuation": "is read.", "gold": 2},
]
FORMS = {"choices": CHOICES, "continuations": CONTINUATIONS, "options": OPTIONS}


@pytest.fixture(scope="module")
def demo():
    return open_model("demo", Settings(device="cpu"))


@pytest.fixture
def file(tmp_path):
    def written(rows, name="own"):
        path = tmp_path / f"{name}.jsonl"
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    return written


def one_by_one(model, context, continuation):
    """Sum of ln p of each token, given all tokens before it alone, without batches or padding."""
    given, total = list(context), 0.0
    for token in continuation:
        with torch.inference_mode():
            logits = model.module(torch.tensor([given])).logits[0, -1].double()
        total += float(logits.log_softmax(-1)[token])
        given.append(token)
    return total


def test_log_probabilities_are_those_of_tokens_one_by_one(demo):
    generator = torch.Generator().manual_seed(0)
    sizes = [(1, 1), (9, 3), (4, 2), (40, 7), (2, 9), (1, 1)]
    rows = [torch.randint(1, 200, (a + b,), generator=generator).tolist() for a, b in sizes]
    pairs = [Pair(tuple(r[:a]), tuple(r[a:])) for r, (a, _) in zip(rows, sizes, strict=True)]
    done = []
    found = likelihoods(demo, pairs, done.append)
    assert sum(done) == len(pairs)
    for pair, own in zip(pairs, found, strict=True):
        assert own.total == pytest.approx(one_by_one(demo, pair.context, pair.continuation), 1e-5)


def test_what_is_too_long_loses_its_beginning(demo):
    room = demo.positions
    ids = torch.randint(1, 200, (2 * room,), generator=torch.Generator().manual_seed(1)).tolist()
    pair = Pair(tuple(ids[:-3]), tuple(ids[-3:]))
    (found,) = likelihoods(demo, [pair])
    with torch.inference_mode():
        logits = demo.module(torch.tensor([ids[-room - 1 : -1]])).logits[0, -3:]
    said = logits.double().log_softmax(-1)[torch.arange(3), torch.tensor(ids[-3:])]
    assert found.total == pytest.approx(float(said.sum()), 1e-6)
    with pytest.raises(InputError, match="more than the"):
        likelihoods(demo, [Pair((1,), tuple(ids[: room + 1]))])


def test_greedy_is_said_of_all_tokens(demo):
    context = demo.tokenizer.encode("This method returns the")
    with torch.inference_mode():
        first = int(demo.module(torch.tensor([context])).logits[0, -1].argmax())
        second = int(demo.module(torch.tensor([[*context, first]])).logits[0, -1].argmax())
    pairs = [Pair(tuple(context), c) for c in ((first, second), (first, second + 1), (first,))]
    assert [own.greedy for own in likelihoods(demo, pairs)] == [True, False, True]


def test_space_at_a_contexts_end_is_of_the_continuation(demo):
    encode = demo.tokenizer.encode
    pair = encoded(demo.tokenizer, "The list \n", " is")
    assert pair.context == tuple(encode("The list"))
    assert [*pair.context, *pair.continuation] == encode("The list \n is")
    start = demo.tokenizer.bos_token_id
    start = demo.tokenizer.eos_token_id if start is None else start
    assert encoded(demo.tokenizer, "", " is").context == (start,)


def test_scores_by_hand(demo, file):
    """The mistake: acc_norm by tokens, or acc by the mean."""
    task = read_task(file(CHOICES[:2]))
    answers = answered_file(demo, task)
    for number, row in enumerate(CHOICES[:2]):
        pairs = [encoded(demo.tokenizer, row["query"], " " + c) for c in row["choices"]]
        totals = [one_by_one(demo, pair.context, pair.continuation) for pair in pairs]
        each = [t / len(c) for t, c in zip(totals, row["choices"], strict=True)]
        assert int(answers.chosen[number]) == totals.index(max(totals))
        assert float(answers.right["acc"][number]) == (totals.index(max(totals)) == row["gold"])
        assert float(answers.right["acc_norm"][number]) == (each.index(max(each)) == row["gold"])
    assert answers.chance == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert answers.figures()["items"] == 2


def test_standard_errors_are_of_samples_and_pairs():
    hits = points([1, 0, 0, 1, 1])
    assert standard_error(hits) == pytest.approx(math.sqrt(0.6 * 0.4 / 4))  # n − 1, not n
    assert standard_error(hits[:1]) is None
    dense = Answers({"acc": hits}, torch.tensor([0, 1, 1, 2, 0]), 0.25)
    small = Answers({"acc": points([1, 1, 0, 0, 1])}, torch.tensor([0, 0, 2, 1, 0]), 0.25)
    change = changes("t", dense.tensors("t"), small.tensors("t"))
    assert change["difference"] == 0
    assert change["flipped"] == 3 / 5  # one of them from wrong to wrong
    assert (change["to_wrong"], change["to_right"]) == (1 / 5, 1 / 5)
    assert change["stderr"] == pytest.approx(math.sqrt(2 / 4 / 5))
    same = changes("t", dense.tensors("t"), dense.tensors("t"))
    assert (same["stderr"], same["flipped"]) == (0, 0)


def test_a_paired_error_is_less_than_both_together():
    """The mistake: errors of two scores added in quadrature hide a loss that every item shows."""
    before = points([1] * 60 + [0] * 40)
    after = points([1] * 54 + [0] * 46)
    kept = [Answers({"acc": own}, own.long(), None).tensors("t") for own in (before, after)]
    change = changes("t", *kept)
    assert not within_error(change)
    assert 2 * math.hypot(standard_error(before), standard_error(after)) > 0.06


def test_doubts():
    figures = {"items": 100, "chance": 0.25, "acc": 0.33, "acc_stderr": 0.043}
    assert at_chance(figures)
    assert at_chance(figures | {"acc": 0.1})  # below it is as blind
    assert not at_chance(figures | {"acc": 0.34})
    assert not at_chance(figures | {"chance": None})
    scores = {"dense": {"a": figures, "b": figures | {"acc": 0.6}}, "compressed": {}}
    said = doubts(scores, {"b": {"difference": -0.02, "stderr": 0.011}})
    assert "dense is at chance level on a:" in said[0]
    assert "no significant difference on b:" in said[1]
    assert len(said) == 2
    assert doubts({}, {"b": {"difference": -0.02, "stderr": 0.009}}) == []


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "is empty. Each line is an object with query, choices, gold; or context_options"),
        (["{"], "line 1: not JSON"),
        (["[1]"], "line 1: no JSON object"),
        ([CHOICES[0], {"query": "a", "choices": ["b", "c"]}], "line 2: lacks 'gold'; it has 'que"),
        ([{"question": "a", "choices": ["b"]}], "line 1: lacks 'query' and 'gold'; it has 'quest"),
        ([CHOICES[0] | {"gold": 3}], "line 1: gold 3 should be .* 0 to 2"),
        ([CHOICES[0] | {"gold": -1}], "line 1: gold -1 should be"),
        ([CHOICES[0] | {"gold": True}], "line 1: gold True should be"),
        ([CHOICES[0] | {"choices": ["a"]}], "'choices' should be a list of two texts"),
        ([CHOICES[0] | {"choices": ["a", ""]}], "'choices' should be a list of two texts"),
        ([CONTINUATIONS[0] | {"continuation": ""}], "'continuation' should be a text"),
        ([CHOICES[0], CONTINUATIONS[0]], "line 2: lacks 'query' and 'choices' and 'gold'.* first"),
    ],
)
def test_bad_files(file, rows, words):
    with pytest.raises(InputError, match=words):
        read_task(file(rows))


def test_missing_files_and_forms(file, tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_task(str(tmp_path / "none.jsonl"))
    assert read_task(file(CONTINUATIONS)).chance is None
    assert read_task(file(OPTIONS)).chance == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert len(read_task(file(CHOICES), 2).items) == 2


def configured(kind, path, cache):
    """The same items as a task of the lm_eval."""
    own = {
        "choices": {
            "output_type": "multiple_choice",
            "doc_to_text": "query",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
        },
        "continuations": {
            "output_type": "loglikelihood",
            "doc_to_text": "{{context}}",
            "doc_to_target": "{{' ' + continuation}}",
        },
        "options": {
            "output_type": "multiple_choice",
            "doc_to_text": lambda doc: doc["gold"],
            "doc_to_choice": "context_options",
            "doc_to_target": "continuation",
        },
    }[kind]
    metrics = ["acc", "acc_norm"] if kind == "choices" else ["acc"]
    return own | {
        "task": kind,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": path}, "cache_dir": str(cache)},
        "test_split": "test",
        "num_fewshot": 0,
        "metric_list": [
            {"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics
        ],
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model by name: the demo, or a compressed checkpoint of it, opened again."""
    from secateur.calibration.collect import Store
    from secateur.data.tokens import Calibration, Tokens
    from secateur.methods import method_class
    from secateur.pipeline.compress_stage import write
    from secateur.pipeline.context import RunContext
    from secateur.pipeline.prepare import prepare
    from secateur.pipeline.run_inputs import Inputs

    def opened(name):
        if name == "demo":
            return open_model("demo", Settings(device="cpu"))
        step, context = step_of(method_class(name)(), 0.6), RunContext()
        ids = torch.randint(1, 2000, (8, 32), generator=torch.Generator().manual_seed(0))
        inputs = Inputs(
            "demo",
            Calibration(samples=8, length=32),
            Tokens(ids, torch.ones_like(ids, dtype=torch.bool)),
            Settings(device="cpu"),
        )
        prepared = prepare(inputs, step, context, store=Store())
        out = tmp_path_factory.mktemp(name) / "out"
        write(prepared, out, context)
        return open_model(out, Settings(device="cpu"))

    return opened


@pytest.mark.parametrize(
    ("which", "kind"),
    [*(("demo", kind) for kind in FORMS), ("flap", "choices"), ("svd", "choices")],
)
def test_the_harness_agrees(checkpoint, file, tmp_path, monkeypatch, kind, which):
    """Every log-probability, every answer, and every figure with its error."""
    pytest.importorskip("lm_eval", reason='pip install "secateur[eval]"')
    pytest.importorskip("accelerate", reason='pip install "secateur[eval]"')
    from lm_eval.api.task import ConfigurableTask

    from secateur.evaluate.lm_eval import judged

    model = checkpoint(which)
    path = file(FORMS[kind])
    loaded = {"tasks": {kind: ConfigurableTask(config=configured(kind, path, tmp_path))}}
    ids, length = model.tokenizer("a b")["input_ids"], len(model.tokenizer)
    monkeypatch.setattr("sys.stderr", shown := Terminal())
    figures, answers = judged(model, loaded, kind, None, Bars())[kind]
    assert f"task: {kind}" in shown.getvalue()  # and hours don't pass in silence
    own = answered_file(model, read_task(path))
    for name, points_of in answers.right.items():
        assert torch.equal(points_of, own.right[name]), name
    assert torch.equal(answers.chosen, own.chosen)
    mine = own.figures()
    assert figures.keys() == mine.keys()
    for name, value in figures.items():
        assert value == (None if value is None else pytest.approx(mine[name], 1e-12)), name
    pairs = [encoded(model.tokenizer, *p) for i in read_task(path).items for p in i.pairs]
    harnessed = [r for i in loaded["tasks"][kind].instances for r in i.resps]
    for (total, greedy), local in zip(harnessed, likelihoods(model, pairs), strict=True):
        assert total == pytest.approx(local.total, rel=1e-5)
        assert greedy == local.greedy
    assert (model.tokenizer("a b")["input_ids"], len(model.tokenizer)) == (ids, length)


def test_without_the_harness(monkeypatch):
    from secateur.evaluate import lm_eval

    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)
    with pytest.raises(InputError, match=r"secateur\[eval\].*a .jsonl"):
        lm_eval.load(["arc_easy"])
    assert lm_eval.load([]) == {}


def test_names_that_the_harness_does_not_know_and_items_that_do_not_come(monkeypatch):
    pytest.importorskip("lm_eval", reason='pip install "secateur[eval]"')
    pytest.importorskip("accelerate", reason='pip install "secateur[eval]"')
    from lm_eval import tasks

    from secateur.evaluate import lm_eval

    class Manager:
        all_tasks = ("arc_easy", "arc_challenge", "piqa")

        def load(self, names):
            raise ConnectionError("Couldn't reach the hub\nand more")

    monkeypatch.setattr(tasks, "TaskManager", Manager)
    with pytest.raises(InputError, match=r"unknown task 'arc_esy'.*The nearest of its 3: arc_easy"):
        lm_eval.load(["arc_esy"])
    with pytest.raises(InputError, match=r"'piqa': its items .*Couldn't reach the hub\)\. They"):
        lm_eval.load(["piqa"])


def test_a_model_without_start_and_end_needs_a_context(demo):
    class Bare:
        bos_token_id = eos_token_id = None

    with pytest.raises(InputError, match="give every item a context"):
        encoded(Bare(), "", "a")
    with pytest.raises(InputError, match="no token of its own"):
        encoded(demo.tokenizer, "a", "")


def test_a_file_of_one_item_has_no_error(demo, file):
    answers = answered_file(demo, replace(read_task(file(CHOICES)), name="x"))
    assert len(answers.chosen) == len(CHOICES)
    one = answered_file(demo, read_task(file(CHOICES), 1)).figures()
    assert one["acc_stderr"] is None
    assert at_chance(one)


@pytest.mark.parametrize("name", ["mine[v2]", "x[/y]", "[bold]", "end\\"])
def test_names_are_shown_as_they_are(name, capsys, monkeypatch):
    """The mistake: a table takes what is in square brackets for a colour."""
    from rich.console import Console

    scores = {"items": 9, "chance": 0.5, "acc": 0.5, "acc_stderr": 0.1}
    change = {"difference": -0.1, "stderr": 0.02, "flipped": 0.2}
    content = made_report(
        dense={"task_scores": {name: scores}, "perplexity": {name: 2.0}},
        compressed={
            "task_scores": {name: scores},
            "task_changes": {name: change},
            "perplexity": {name: 3.0},
        },
    )
    made, console = Report(content), Console(width=100)
    tables = (
        outcome.task_table({name: scores}),
        outcome.task_comparison(content["dense"], content["compressed"]),
        comparison(made),
    )
    for table in tables:
        console.print(table)
        assert name in capsys.readouterr().out
    assert task_rows(made)[1][0] == f"{name}, acc"
    monkeypatch.setattr("sys.stderr", shown := Terminal())
    with Bars().stage(name, 3) as advance:
        advance(3)
    assert name in shown.getvalue()


class Terminal(io.StringIO):
    """What a person sees."""

    def isatty(self):
        return True


def sample(right, answers=2, choices=2, **more):
    """What the harness keeps of an item."""
    from secateur.evaluate.lm_eval import CHOICES as NUMBER

    responses = [(-float(i), False) for i in range(answers)][::-1]
    return {
        "filter": "none",
        "metrics": ["acc"],
        "acc": right,
        "target": 0,
        "filtered_resps": responses,
        NUMBER: choices,
    } | more


@pytest.mark.parametrize(
    ("samples", "chance"),
    [
        ([sample(1.0), sample(0.0)], 0.5),
        ([sample(1.0), sample(0.0, answers=4, choices=4)], 0.375),
        ([sample(1.0, target=[0, 1], answers=4, choices=4)], 0.5),
        ([sample(1.0), sample(0.3)], None),  # a share of probability, as in truthfulqa_mc2
        ([sample(1.0), sample(0.0, answers=4, choices=2)], None),  # and without context
        ([sample(1.0, choices=None)], None),
    ],
)
def test_chance_is_of_right_or_wrong_choices(samples, chance):
    from secateur.evaluate.lm_eval import CHOICES as NUMBER
    from secateur.evaluate.lm_eval import by_task

    figures, answers = by_task("t", {"t": samples}, {"t": {"acc,none": 1.0}}, {})["t"]
    assert figures["chance"] == chance
    assert answers.chosen[-1] == (samples[-1][NUMBER] or 2) - 1  # not one without context


def test_a_group_is_one_entry_only_where_it_is_the_mean_of_its_items():
    """The mistake: a mean of tasks' means beside the error of the mean of items."""
    from secateur.evaluate.lm_eval import by_task

    tasks = {"a": [sample(1.0)] * 4, "b": [sample(0.0)] * 2 + [sample(1.0)] * 2 + [sample(0.0)] * 4}
    said = {"a": {"acc,none": 1.0}, "b": {"acc,none": 0.25}}
    pooled = by_task("g", tasks, said, {"g": {"acc,none": 0.5}})
    assert [*pooled] == ["g"]
    assert pooled["g"][0]["items"] == 12
    for group in ({"acc,none": 0.625}, {"alias": "g"}):
        found = by_task("g", tasks, said, {"g": group})
        assert {name: figures["acc"] for name, (figures, _) in found.items()} == {
            "a": 1.0,
            "b": 0.25,
        }
