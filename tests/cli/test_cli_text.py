"""Where a text may come from: a file, a folder, JSONL, a datasets name, the bundled one."""

import json
import sys
from types import ModuleType

import pytest
from conftest import sentences

DOCUMENTS = [sentences(seed, 40) for seed in (11, 12, 13)]


@pytest.fixture
def calibration(run, model, monkeypatch):
    """The calibration record of a plan made with one source."""

    def record(source):
        given = ["--samples", 8, "--length", 32, "--dry-run", "--json"]
        shown = run("plan", model, "--calibration", source, *given).succeeded()
        return json.loads(shown.out)["calibration"]

    return record


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    for name, document in zip("abc", DOCUMENTS, strict=True):
        (path / f"{name}.txt").write_text(document)
    return path


def write_jsonl(path, documents, **options):
    rows = (json.dumps({"id": 1, "text": d}, **options) for d in documents)
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def test_a_file(calibration, text):
    found = calibration(text)
    assert found["tokens"] == 8 * 32
    assert found["source"] == str(text)


def test_a_folder_is_its_files_in_order(calibration, folder, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", DOCUMENTS)
    assert calibration(folder)["fingerprint"] == calibration(rows)["fingerprint"]


def test_a_folder_is_read_to_its_depth(calibration, folder):
    whole = calibration(folder)["fingerprint"]
    (folder / "d").mkdir()
    (folder / "c.txt").rename(folder / "d" / "c.txt")
    (folder / "ignored.bin").write_bytes(b"\xff\x00")
    assert calibration(folder)["fingerprint"] == whole


def test_a_folder_of_jsonl(calibration, folder, tmp_path):
    rows = tmp_path / "rows"
    rows.mkdir()
    write_jsonl(rows / "rows.jsonl", DOCUMENTS)
    assert calibration(rows)["fingerprint"] == calibration(folder)["fingerprint"]


def test_documents_are_kept_apart(calibration, folder, tmp_path):
    (tmp_path / "joined.txt").write_text("".join(DOCUMENTS))
    joined = calibration(tmp_path / "joined.txt")
    assert joined["fingerprint"] != calibration(folder)["fingerprint"]


@pytest.mark.parametrize("separator", ["\u2028", "\u0085", "\u2029"])
def test_jsonl_ends_its_lines_at_newlines_only(calibration, tmp_path, separator):
    """JSON strings may hold Unicode's own line separators as they are."""
    documents = [separator.join(DOCUMENTS)]
    raw = write_jsonl(tmp_path / "raw.jsonl", documents, ensure_ascii=False)
    escaped = write_jsonl(tmp_path / "escaped.jsonl", documents)
    assert calibration(raw)["fingerprint"] == calibration(escaped)["fingerprint"]


@pytest.mark.parametrize("line_end", ["\r\n", "\n\n"])
def test_other_line_ends_in_jsonl(calibration, folder, tmp_path, line_end):
    rows = line_end.join(json.dumps({"text": d}) for d in DOCUMENTS)
    (tmp_path / "rows.jsonl").write_bytes(rows.encode())
    assert calibration(tmp_path / "rows.jsonl")["fingerprint"] == calibration(folder)["fingerprint"]


def test_a_byte_order_mark_is_no_text(calibration, folder, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", DOCUMENTS)
    rows.write_bytes(b"\xef\xbb\xbf" + rows.read_bytes())
    assert calibration(rows)["fingerprint"] == calibration(folder)["fingerprint"]


def test_bundled(calibration):
    assert calibration("bundled")["tokens"] == 8 * 32


def test_fewer_windows_than_asked_for_are_all_used(run, model, tmp_path):
    (tmp_path / "short.txt").write_text(sentences(5, 12))
    given = ["--samples", 1000, "--length", 32, "--dry-run", "--json"]
    shown = run("plan", model, "--calibration", tmp_path / "short.txt", *given).succeeded()
    assert 32 < json.loads(shown.out)["calibration"]["tokens"] < 1000 * 32


@pytest.fixture
def datasets(monkeypatch):
    """A stand-in for the datasets library; its ``asked`` says what it was asked for."""
    module = ModuleType("datasets")
    module.asked, module.rows = [], [{"text": document} for document in DOCUMENTS]

    def load_dataset(*args, **options):
        module.asked.append((args, options))
        if args[0] == "nobody/nothing":
            raise FileNotFoundError("Dataset 'nobody/nothing' doesn't exist on the Hub.\nmore")
        return iter(module.rows)

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("owner/name", ("owner/name", None, "train")),
        ("owner/name:config", ("owner/name", "config", "train")),
        ("owner/name:config-v1:test", ("owner/name", "config-v1", "test")),
        ("owner/name::test", ("owner/name", None, "test")),
        ("owner/fineweb-2.0", ("owner/fineweb-2.0", None, "train")),
    ],
)
def test_a_datasets_name(calibration, datasets, folder, name, asked):
    assert calibration(name)["fingerprint"] == calibration(folder)["fingerprint"]
    (args, options) = datasets.asked[0]
    assert (*args, options["split"]) == asked
    assert options["streaming"] is True


def test_a_dataset_without_text_is_refused(run, model, datasets):
    datasets.rows = [{"content": "a"}]
    run("plan", model, "--calibration", "owner/name", "--length", 32, "--dry-run").refused(
        "owner/name", '"text"'
    )


def test_an_unknown_dataset_is_refused(run, model, datasets):
    shown = run("plan", model, "--calibration", "nobody/nothing", "--length", 32, "--dry-run")
    shown.refused("nobody/nothing", "no such file", "doesn't exist")


def test_without_datasets_a_name_says_what_to_install(run, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    shown = run("plan", model, "--calibration", "owner/name", "--length", 32, "--dry-run")
    shown.refused("owner/name", "no file", 'pip install "secateur[datasets]"')
