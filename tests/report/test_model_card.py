"""Model cards, which the hub has to be able to read, and uploads to a stand-in of it."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard, constants

from secateur import InputError
from secateur.report import hub as pushing
from secateur.report.hub import push
from secateur.report.model_card import card, license_of, write_card
from secateur.report.report import Report, lines
from secateur.report.run_records import read_run
from tests.support.made_runs import first_version, made_run, report

HOSTILE = "a|b\n# Title\n```\n<script>alert(1)</script> [x](javascript:1) *y* `z`"


def read(content, license_name=None):
    """The card as the hub's own library reads it."""
    text = card(Report(content), license_name)
    found = ModelCard(text)
    assert found.content.strip() == text.strip()
    return found


def whole(tmp_path, **changes):
    return read_run(made_run(tmp_path / "out", report(**changes))).report.content


def test_a_card_is_valid_and_says_only_what_is_known(tmp_path):
    data = read(whole(tmp_path)).data.to_dict()
    assert data == {
        "library_name": "transformers",
        "base_model": "some/model",
        "pipeline_tag": "text-generation",
        "tags": ["secateur", "compressed", "auto"],
    }


@pytest.mark.parametrize("source", ["/home/me/model", "./some/model", "demo", "model", "C:\\m"])
def test_a_folder_is_no_base_model(tmp_path, source):
    """The mistake: a path of somebody's machine in what everybody reads."""
    model = {"source": source, "model_type": "llama", "fingerprint": "f"}
    found = read(whole(tmp_path, model=model))
    assert found.data.base_model is None
    assert "/home/me" not in found.content


def test_a_folder_that_looks_like_a_hub_id_is_none(tmp_path, monkeypatch):
    content = whole(tmp_path)
    (tmp_path / "some" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert read(content).data.base_model is None


def test_a_card_has_the_lines_of_the_report(tmp_path):
    content = whole(tmp_path)
    text = read(content).text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == len(lines(Report(content))) + 1
    assert "| bytes on disk | 4.00 kB | 3.20 kB | 80.0% |" in rows
    for word in ("corpus.txt", "knapsack", "report.html", "a time there was a dog"):
        assert word in text


@pytest.mark.parametrize(
    ("changes", "words", "absent"),
    [
        ({"tier": "plain"}, ["AutoModelForCausalLM"], ["trust_remote_code", "import secateur"]),
        ({"tier": "per-layer"}, ["trust_remote_code=True", "\nimport secateur\n"], ["pip install"]),
        (
            {"tier": "factored", "libraries": ["compressed-tensors"]},
            ["pip install compressed-tensors", "base_model_relation: quantized"],
            [],
        ),
        (
            {"libraries": ["a; touch /tmp/x", "--pre", "$(id)", "some-name"]},
            ["pip install some-name\n"],
            ["touch", "$(id)", "--pre"],
        ),
        (
            {"model": {"source": "a/b", "model_type": "vit", "fingerprint": ""}},
            ["AutoModelForImageClassification", "pipeline_tag: image-classification"],
            [],
        ),
        (
            {"model": {"source": "a/b", "model_type": "t5", "fingerprint": ""}},
            ["AutoModelForSeq2SeqLM"],
            ["pipeline_tag"],
        ),
    ],
    ids=str,
)
def test_loading_goes_by_tier_and_use(tmp_path, changes, words, absent):
    text = card(Report(whole(tmp_path, **changes)))
    for word in words:
        assert word in text, word
    for word in absent:
        assert word not in text, word


def test_code_of_the_card_is_python(tmp_path):
    text = card(Report(whole(tmp_path)))
    for code in re.findall(r"```python\n(.*?)```", text, re.S):
        compile(code, "card", "exec")


def test_nothing_in_a_report_becomes_markdown(tmp_path):
    content = whole(
        tmp_path,
        model={"source": HOSTILE, "model_type": HOSTILE, "fingerprint": ""},
        method={"name": HOSTILE, "options": {HOSTILE: HOSTILE}},
        tier=HOSTILE,
        versions={"secateur": HOSTILE},
        calibration={"source": HOSTILE, "samples": 1, "length": 2, "seed": HOSTILE},
        dense={"sample": HOSTILE, "prompt": HOSTILE, "perplexity": {HOSTILE: 2.0}},
        compressed={"sample": HOSTILE, "perplexity": {HOSTILE: 3.0}},
    )
    found = read(content, None)
    assert found.data.tags == ["secateur", "compressed"]
    assert found.data.base_model is None
    text, samples = re.fullmatch(r"(.*)\n(````+)\n.*\n\2\n?", found.text, re.S).groups()[0], True
    assert samples
    assert not re.search(r"^# Title", text, re.M)
    assert not re.search(r"(?<!\\)<", text.replace("<br>", ""))
    assert not re.search(r"(?<!\\)\[x", text)
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {5}


def test_a_report_of_the_first_version_has_a_card(tmp_path):
    folder = made_run(tmp_path / "out", first_version())
    path = write_card(read_run(folder))
    assert path == folder / "README.md"
    assert ModelCard.load(path).data.library_name == "transformers"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: mit\n---\n# x", "mit"),
        ("---\nlicense: [mit]\n---\n", None),
        ("---\ntags: [a]\n---\n", None),
        ("---\n: : :\n---\n", None),
        ("license: mit", None),
        ("", None),
    ],
)
def test_a_license_is_the_one_of_the_original(tmp_path, text, expected):
    (tmp_path / "README.md").write_text(text)
    assert license_of(str(tmp_path)) == expected
    assert license_of("no/such-model") is None
    assert license_of("/no/such/model") is None


def test_the_license_is_in_the_card(tmp_path):
    assert read(whole(tmp_path), "apache-2.0").data.license == "apache-2.0"


# Uploads


@pytest.fixture
def finished(tmp_path):
    folder = made_run(tmp_path / "out")
    write_card(read_run(folder))
    return folder


@pytest.fixture
def hub(monkeypatch):
    """A server on this machine that answers as the hub does, and what it was sent."""
    sent = {"made": [], "files": {}, "private": True, "refuse": None}

    class Answers(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def answer(self, content, status=200):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def do_GET(self):
            known = {"id": "me/small", "private": sent["private"], "sha": "a" * 40}
            self.answer({"error": "no"}, sent["refuse"]) if sent["refuse"] else self.answer(known)

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            assert self.headers["Authorization"] == "Bearer hf_test"
            if sent["refuse"]:
                self.answer({"error": "no"}, sent["refuse"])
            elif self.path == "/api/repos/create":
                sent["made"].append(json.loads(body))
                self.answer({"url": f"http://{self.headers['Host']}/me/small"})
            elif self.path == "/api/validate-yaml":
                self.answer({"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                files = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]
                self.answer({"files": files})
            elif "/commit/" in self.path:
                for line in body.decode().splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        sent["files"][entry["value"]["path"]] = entry["value"]["content"]
                url = f"http://{self.headers['Host']}/me/small/commit/{'a' * 40}"
                self.answer({"commitUrl": url, "commitOid": "a" * 40})
            else:
                self.answer({"error": f"unexpected {self.path}"}, 404)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(pushing, "HfApi", lambda: HfApi(endpoint=address, token="hf_test"))
    yield sent
    server.shutdown()
    server.server_close()


def test_a_push_uploads_the_whole_folder(finished, hub):
    address = push(finished, "me/small", private=True)
    assert address.endswith("/me/small")
    (made,) = hub["made"]
    assert made["name"] == "small"
    assert True in (made.get("private"), made.get("visibility") == "private")
    here = {str(p.relative_to(finished)) for p in finished.rglob("*") if p.is_file()}
    assert set(hub["files"]) == here
    assert {"README.md", "secateur/report.json", "model.safetensors"} <= here


def test_a_private_push_to_a_public_repository_is_refused(finished, hub):
    """The mistake: weights that should be private in what everybody sees."""
    hub["private"] = False
    with pytest.raises(InputError, match="public"):
        push(finished, "me/small", private=True)
    assert hub["files"] == {}


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_of_the_hub_is_a_message(finished, hub, status):
    hub["refuse"] = status
    with pytest.raises(InputError, match="me/small"):
        push(finished, "me/small")


def test_without_a_token_nothing_is_sent(finished, monkeypatch):
    monkeypatch.setattr(pushing, "get_token", lambda: None)
    monkeypatch.setattr(pushing, "HfApi", lambda: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match="hf auth login"):
        push(finished, "me/small")


def test_without_a_network_there_is_a_message(finished, hub, monkeypatch):
    nobody = HfApi(endpoint="http://127.0.0.1:9", token="hf_test")
    monkeypatch.setattr(pushing, "HfApi", lambda: nobody)
    with pytest.raises(InputError, match="could not be uploaded"):
        push(finished, "me/small")


@pytest.mark.parametrize(
    ("missing", "word"),
    [
        ("secateur/report.json", "report.json"),
        ("config.json", "config.json"),
        ("model.safetensors", "model.safetensors"),
        ("README.md", "secateur report"),
    ],
)
def test_what_is_no_whole_run_is_refused(finished, missing, word):
    (finished / missing).unlink()
    with pytest.raises(InputError, match=word):
        push(finished, "me/small")


def test_a_missing_shard_is_refused(finished):
    (finished / "model.safetensors").rename(finished / "model-00001-of-00002.safetensors")
    index = {"weight_map": {f"w{n}": f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}}
    (finished / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="model-00002-of-00002"):
        push(finished, "me/small")


def test_an_unfinished_run_is_refused(finished):
    (finished.parent / "fingerprint.json").write_text("{}")
    with pytest.raises(InputError, match="not finished"):
        push(finished, "me/small")


@pytest.mark.parametrize("name", ["a/b/c", "-x", "a b", ""])
def test_a_name_that_can_be_none_is_refused(finished, hub, name):
    with pytest.raises(InputError, match="USER/NAME"):
        push(finished, name)
    assert hub["made"] == []


def test_front_matter_is_one_document(tmp_path):
    text = card(Report(whole(tmp_path, method={"name": "---\nlicense: mit", "options": {}})))
    head = text.split("---\n")[1]
    assert "license" not in yaml.safe_load(head)
