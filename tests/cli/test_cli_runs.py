"""Finished runs on the command line: the page and card that they bring, compare, report, push."""

import json
import shutil
from types import SimpleNamespace

import pytest
from huggingface_hub import RepoUrl

from tests.support.made_runs import made_run, report


@pytest.fixture
def runs(tmp_path):
    small = {"perplexity": {"held.txt": 14.0}, "bytes": 3500}
    return [
        made_run(tmp_path / "good", report()),
        made_run(tmp_path / "beaten[bold]", report(compressed=small)),
    ]


def test_a_run_brings_its_page_and_card(finished):
    out, _ = finished
    page = (out / "secateur" / "report.html").read_text()
    for word in ("Dense and compressed model", "What was removed", "Residual stream", "held.txt"):
        assert word in page
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    seen = json.loads((out / "secateur" / "report.json").read_text())["observed"]
    assert len(seen) == 1
    assert [set(own) for own in seen[0]["errors"]] == [{"attention", "mlp", "stream"}] * 2


def test_compress_says_where_the_page_is_and_notes_the_command(compress, room):
    shown = compress().succeeded().out
    page = room / "out" / "secateur" / "report.html"
    assert f"report page: {page}" in shown
    told = json.loads((page.parent / "report.json").read_text())["command"]
    assert told.startswith("secateur compress ")
    assert "--calibration" in told
    assert str(room / "out") in page.read_text()


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), OverflowError("too large"), "template"]
)
def test_a_page_that_fails_loses_no_run(compress, room, monkeypatch, error):
    """The mistake: hours of work gone for a picture."""
    from jinja2 import TemplateError

    from secateur.pipeline import run_record as pipeline

    def fail(*_):
        raise TemplateError("bad") if error == "template" else error

    monkeypatch.setattr(pipeline, "write_page", fail)
    done = compress().succeeded()
    assert "the report page was not written" in done.err
    assert "secateur report" in done.err
    assert (room / "out" / "model.safetensors").exists()
    assert not (room / "out" / "secateur" / "report.html").exists()
    assert "report page" not in done.out


def test_a_recipe_has_a_part_for_each_step(run, near, model, text, held, room):
    (room / "r.yaml").write_text(
        "steps: [{method: auto, keep: 0.8}, {method: svd-llm, keep: 0.5, options: {rank_step: 1}}]"
    )
    given = ["--calibration", text, "--eval", held, "--samples", 4, "--length", 32, "--no-speed"]
    given += ["--eval-windows", 2, "--new-tokens", 4]
    run("compress", model, room / "out", "--recipe", room / "r.yaml", *given).succeeded()
    page = (room / "out" / "secateur" / "report.html").read_text()
    for word in ("step 1, auto", "step 2, svd-llm"):
        assert word in page
    assert (room / "out" / "README.md").exists()


def test_compare_shows_a_table_that_fits(run, runs):
    shown = run("compare", *runs).succeeded()
    assert max(map(len, shown.out.splitlines())) <= 100
    (row,) = (line for line in shown.out.splitlines() if "beaten[bold]" in line)
    assert "+40.0%" in row
    assert shown.err == ""


def test_compare_of_long_names_fits(run, tmp_path):
    runs = [made_run(tmp_path / f"{'long-name-' * 9}{i}", report()) for i in range(2)]
    shown = run("compare", *runs).succeeded()
    assert max(map(len, shown.out.splitlines())) <= 100
    assert "12.00" in shown.out


def test_compare_json(run, runs):
    content = json.loads(run("compare", *runs, "--json").succeeded().out)
    assert [entry["name"] for entry in content["runs"]] == ["good", "beaten[bold]"]
    assert [entry["frontier"]["bytes"] for entry in content["runs"]] == [True, False]


def test_compare_draws_the_frontier(run, runs, room):
    run("compare", *runs, "--plot", room / "f.svg").succeeded()
    assert (room / "f.svg").read_text().startswith("<svg")
    (room / "f.svg").write_text("mine")
    run("compare", *runs, "--plot", room / "f.svg").refused("f.svg", "--overwrite")
    assert (room / "f.svg").read_text() == "mine"
    run("compare", *runs, "--plot", room / "f.svg", "--overwrite").succeeded()
    assert (room / "f.svg").read_text().startswith("<svg")
    run("compare", *runs, "--plot", room / "f.png").refused("f.png", "SVG")
    run("compare", *runs, "--plot", room / "no" / "f.svg").refused("no folder")


def test_what_can_not_be_compared_is_refused(run, runs, model, room, tmp_path):
    run("compare", runs[0], model).refused("report.json", str(model))
    run("compare", room / "nothing").refused("no such folder")
    other = {"source": "other", "model_type": "llama", "fingerprint": "e"}
    run("compare", runs[0], made_run(tmp_path / "x", report(model=other))).refused("other")
    assert run("compare").code == 2


def test_report_is_written_anew_with_siblings(run, runs):
    shown = run("report", runs[0], "--siblings", runs[1]).succeeded().out.split()
    page, card = runs[0] / "secateur" / "report.html", runs[0] / "README.md"
    assert shown == [str(page), str(card)]
    assert "Comparison with other runs" in page.read_text()
    run("report", runs[0]).succeeded()
    assert "Comparison with other runs" not in page.read_text()


def test_report_of_what_is_no_run_is_refused(run, model, room):
    run("report", model).refused("report.json")
    later = made_run(room / "later", report(version=99))
    run("report", later).refused("99", "upgrade")
    shutil.rmtree(later)
    assert list(room.iterdir()) == []


def test_push_without_a_token_is_refused(run, runs, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("secateur.report.hub.get_token", lambda: None)
    run("report", runs[0]).succeeded()
    run("push", runs[0], "me/small").refused("hf auth login")
    run("push", runs[1], "me/small").refused("no model card", "secateur report")


def test_push_without_a_network_is_refused(run, runs, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_test")  # and the tests are offline
    run("report", runs[0]).succeeded()
    run("push", runs[0], "me/small").refused("me/small", "could not be uploaded")


def test_push_uploads_a_run_and_shows_where_it_is(run, runs, monkeypatch):
    """How the hub is spoken to is tested in report/test_model_card.py."""
    asked = []

    class Hub:
        def create_repo(self, repo, **options):
            asked.append(("create", repo, options["private"]))
            return RepoUrl(f"https://huggingface.co/{repo}")

        def model_info(self, repo):
            return SimpleNamespace(private=True)

        def upload_folder(self, **options):
            asked.append(("upload", options["repo_id"], options["folder_path"]))

    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr("secateur.report.hub.HfApi", Hub)
    run("report", runs[0]).succeeded()
    shown = run("push", runs[0], "me/small", "--private").succeeded()
    assert asked == [("create", "me/small", True), ("upload", "me/small", runs[0])]
    assert "https://huggingface.co/me/small" in shown.out
