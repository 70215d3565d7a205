"""``--tasks``, ``--damage`` and ``--against``: both models in one run, on the same items."""

import json

import pytest
from conftest import save_checkpoint, sentences

CHOICES = [
    {"query": f"the gardener cuts {i}", "choices": ["old wood", "water", "apples"], "gold": i % 3}
    for i in range(6)
]
LAST = [{"context": "roots drink", "continuation": "water"} for _ in range(3)]
SMALL = ["--no-speed", "--eval-windows", "2", "--eval-length", "32", "--new-tokens", "4"]


@pytest.fixture
def tasks(tmp_path):
    """A folder outside the output's with two task files."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, rows in (("pick", CHOICES), ("last", LAST)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def evaluated(run, near, model, held):
    def command(*args, source=None):
        return run("eval", source or model, "--eval", held, *SMALL, *args)

    return command


def test_eval_scores_task_files(evaluated, tasks):
    files = f"{tasks / 'pick.jsonl'},{tasks / 'last.jsonl'}"
    scores = json.loads(evaluated("--tasks", files, "--json").succeeded().out)["task_scores"]
    assert scores.keys() == {"pick", "last"}
    assert scores["pick"].keys() == {
        *("items", "chance", "acc", "acc_stderr", "acc_norm", "acc_norm_stderr")
    }
    assert scores["pick"]["chance"] == pytest.approx(1 / 3)
    assert scores["last"]["chance"] is None
    shown = evaluated("--tasks", tasks / "pick.jsonl", "--task-limit", 2).succeeded().out
    assert "± error" in shown
    assert "33.3%" in shown
    assert "note: the model is at chance level on pick" in shown.replace("\n", " ")
    assert all(len(line) <= 100 for line in shown.splitlines())


def test_compress_judges_both_models_on_the_same_items(compress, room, tasks):
    from secateur.evaluate.task_file import read_task

    shown = compress("--tasks", tasks / "pick.jsonl", "--keep", 0.5, "--damage").succeeded()
    report = json.loads((room / "out" / "secateur" / "report.json").read_text())
    dense, small = report["dense"], report["compressed"]
    assert dense["task_changes"] == {}
    change = small["task_changes"]["pick"]
    before, after = (side["task_scores"]["pick"]["acc"] for side in (dense, small))
    assert change["difference"] == pytest.approx(after - before)
    assert change["to_right"] - change["to_wrong"] == pytest.approx(after - before)
    assert change["flipped"] >= change["to_right"] + change["to_wrong"]
    assert change["stderr"] is not None
    assert report["doubts"]
    for side in (dense, small):
        assert {"confidence", "repetition"} <= side["damage"].keys()
    assert "expected calibration error" in shown.out
    assert "pick, acc" in shown.out
    tables = shown.out.partition("\nprompt: ")[0]
    assert all(len(line) <= 100 for line in tables.splitlines())
    assert "task_limit: null" in (room / "out" / "secateur" / "recipe.yaml").read_text()
    assert len(read_task(str(tasks / "pick.jsonl")).items) == dense["task_scores"]["pick"]["items"]


def test_without_asking_nothing_of_it_is_measured(compress, room, held, text, tmp_path):
    (tmp_path / "other.txt").write_text(sentences(7, 60))
    shown = compress("--eval", tmp_path / "other.txt").succeeded()
    report = json.loads((room / "out" / "secateur" / "report.json").read_text())
    for side in ("dense", "compressed"):
        assert report[side]["damage"] == report[side]["task_scores"] == {}
    assert report["doubts"] == []
    assert "flipped" not in shown.out
    rise = report["domains"]["rise"]
    assert rise.keys() == {"held.txt", "other.txt"}
    assert report["domains"]["spread"] == pytest.approx(max(rise.values()) - min(rise.values()))


def test_a_model_against_itself_differs_in_nothing(evaluated, model, tasks):
    shown = evaluated("--against", model, "--tasks", tasks / "pick.jsonl", "--json").succeeded()
    report = json.loads(shown.out)
    assert report["compressed"]["agreement"]["top1"] == 1
    assert report["compressed"]["agreement"]["kl"] == 0
    change = report["compressed"]["task_changes"]["pick"]
    assert change == dict.fromkeys(("difference", "stderr", "flipped", "to_wrong", "to_right"), 0)
    assert any("no significant difference on pick" in doubt for doubt in report["doubts"])
    shown = evaluated("--against", model).succeeded().out
    assert "top-1 agreement" in shown


def test_models_that_read_unlike_are_not_compared(evaluated, llama_config, tokenizer, tmp_path):
    other = save_checkpoint(tmp_path / "wide", llama_config(vocab_size=400), tokenizer)
    refused = evaluated("--against", other)
    refused.refused("do not read the text alike", "400", "320")


def test_what_cannot_be_asked_is_refused_before_anything_is_measured(run, near, model, tasks, room):
    bad = tasks / "bad.jsonl"
    bad.write_text('{"query": "a", "choices": ["b", "c"]}\n')
    run("eval", model, "--tasks", bad).refused("line 1", "'gold'", "context, continuation")
    run("compress", model, room / "out", "--tasks", bad).refused("line 1", "'gold'")
    run("eval", model, "--tasks", bad.rename(tasks / "a,b.jsonl")).refused("a,b", "line 1")
    many = ",".join([str(tasks / "pick.jsonl")] * 90 + [str(tasks / "none.jsonl")])
    run("eval", model, "--tasks", many).refused("no such file")
    run("eval", model, "--tasks", tasks / "none.jsonl").refused("no such file")
    assert near == []
    assert list(room.iterdir()) == []


def test_only_causal_models_answer(run, near, tmp_path, tasks):
    from transformers import BertConfig, BertForMaskedLM

    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(**shape, intermediate_size=16)).save_pretrained(tmp_path / "bert")
    refused = run("eval", tmp_path / "bert", "--tasks", tasks / "pick.jsonl")
    refused.refused("masked language model", "causal", "leave them out")
    assert near == []
