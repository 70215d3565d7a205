"""Masked language models and image classifiers on the command line."""

import json

import pytest
import torch
from conftest import report_of, sizes

from secateur.cli.render import show_verdict
from secateur.evaluate.measurements import Measurements
from tests.support import families

KEPT = ["--keep", "0.7", "--method", "modegpt"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints, and what they read."""
    from PIL import Image

    root, generator = tmp_path_factory.mktemp("encoders"), torch.Generator().manual_seed(0)
    for name in ("bert", "vit"):
        families.save(families.random_model(name), root / name)
    for number in range(60):
        own = root / "images" / f"LABEL_{number % 10}"
        own.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (20, 20, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(own / f"{number}.png")
    (root / "words.txt").write_text(families.words(2000))
    return root


@pytest.fixture
def source(folder):
    """Variant to its flags for calibration."""
    return {
        "bert": ["--calibration", folder / "words.txt", "--samples", 16, "--length", 32],
        "vit": ["--calibration", folder / "images", "--samples", 16],
    }


@pytest.fixture(params=["bert", "vit"])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def runs():
    """Variant to the output of a run that no test changes."""
    return {}


@pytest.fixture
def made(name, runs, folder, source, run, near, tmp_path_factory):
    """Output of a whole run, and what was shown."""
    if name not in runs:
        out = tmp_path_factory.mktemp("made") / "out"
        given = [*source[name], *KEPT, "--eval-windows", 6]
        runs[name] = out, run("compress", folder / name, out, *given).succeeded().out
    return runs[name]


def test_a_run_reports_answers_and_agreement(name, made):
    out, shown = made
    report = report_of(out)
    share, counts = {
        "bert": ("hidden tokens found, rest of words.txt", "hidden tokens"),
        "vit": ("accuracy, rest of images", "images"),
    }[name]
    for side in ("dense", "compressed"):
        one = report[side]
        assert 0 <= one["tasks"][share] <= 1
        assert one["counts"] == counts
        assert one["prompt"] == one["sample"] == ""
        assert "decode_tokens_per_second" not in one["speed"]
        assert one["speed"]["prefill_tokens_per_second"] > 0
    first = next(iter(report["dense"]["tokens"]))
    assert report["dense"]["tokens"][first] == (6 if name == "vit" else pytest.approx(27, abs=12))
    assert report["dense"]["agreement"] == {}
    assert report["compressed"]["agreement"]["kl"] > 0
    assert 0 <= report["compressed"]["agreement"]["top1"] <= 1
    assert report["budget"]["reached"] <= 0.7
    assert share in shown
    assert "top-1 agreement, rest of" in shown
    assert "nan" not in shown
    assert "YOUR_IMAGES" in shown if name == "vit" else "YOUR_TEXT" in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_the_result_is_inspected_and_measured_like_any_model(name, made, folder, run, near):
    out, _ = made
    text = folder / ("words.txt" if name == "bert" else "images")
    found = run("eval", out, "--eval", text, "--eval-windows", 6, "--no-speed", "--json")
    measurements = json.loads(found.succeeded().out)
    assert measurements["parameters"] == report_of(out)["compressed"]["parameters"]
    assert len(measurements["tasks"]) == len(measurements["perplexity"]) == 1
    shown = run("eval", out, "--eval", text, "--eval-windows", 6, "--no-speed").succeeded().out
    assert measurements["counts"] in shown
    content = json.loads(run("inspect", folder / name, "--json").succeeded().out)
    assert {unit["kind"] for unit in content["units"]} == {"mlp", "query_key", "value_output"}
    shown = run("inspect", folder / name).succeeded().out
    assert ("--calibration YOUR_IMAGES" in shown) == (name == "vit")


@pytest.mark.parametrize(("counts", "things"), [("images", "images"), ("hidden tokens", "tokens")])
def test_images_are_read_by_the_image(capsys, counts, things):
    """The mistake: images a second shown as tokens."""
    speed = {"prefill_tokens_per_second": 12.0}
    show_verdict(Measurements(1, 1, {}, {}, "", "", 1, speed, counts))
    assert f"prefill, {things}/s" in capsys.readouterr().out


def test_a_plan_makes_the_same_again(name, made, folder, source, run, near, room):
    from safetensors.torch import load_file

    out, _ = made
    run("plan", folder / name, *source[name], *KEPT, "-o", room / "p.json").succeeded()
    plan = json.loads((room / "p.json").read_text())
    assert sizes(plan) == sizes(json.loads((out / "secateur" / "plan.json").read_text()))
    given = ["--plan", room / "p.json", "--eval-windows", 2, "--no-speed"]
    run("compress", folder / name, room / "out", *given).succeeded()
    before, after = (load_file(f / "model.safetensors") for f in (out, room / "out"))
    assert set(before) == set(after)
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--method", "slicegpt"], ["slicegpt", "can't serve", "auto", "modegpt", "flap"]),
        (["--select-calibration", "dpp"], ["--select-calibration dpp", "causal", "leave it out"]),
        (["--select-calibration", "kl"], ["--select-calibration kl", "causal"]),
        (["--target", "cache"], ["--target cache", "writes nothing", "parameters"]),
    ],
)
def test_what_makes_no_sense_is_refused(run, folder, source, room, name, flags, words):
    run("plan", folder / name, *source[name], *flags, "-o", room / "p.json").refused(*words)
    assert list(room.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("vit", [], ["bundled", "image", "--calibration"]),
        ("vit", ["--calibration", "words.txt"], ["words.txt", "folder of images"]),
        ("vit", ["--calibration", "nowhere"], ["nowhere", "folder of images"]),
        ("vit", ["--calibration", "bert"], ["bert", ".png"]),
        ("vit", ["--calibration", "images", "--eval", "words.txt"], ["words.txt", "--eval"]),
        ("bert", ["--calibration", "images", "--length", "9"], ["images", ".txt"]),
        ("bert", ["--calibration", "words.txt", "--length", "2"], ["2 tokens", "at least 3"]),
        ("bert", ["--calibration", "words.txt", "--length", "65"], ["65", "64 positions"]),
        ("bert", ["--calibration", "words.txt", "--length", "9", "--prompt", "w1"], ["--prompt"]),
        ("vit", ["--calibration", "images", "--new-tokens", "4"], ["--new-tokens", "writes"]),
        ("vit", ["--calibration", "images", "--length", "9"], ["--length", "images", "leave it"]),
        ("vit", ["--calibration", "images", "--eval-length", "9"], ["--eval-length", "images"]),
        ("vit", ["--calibration", "images", "--latency-length", "9"], ["--latency-length"]),
    ],
)
def test_bad_input_is_refused(run, near, folder, room, monkeypatch, name, flags, words):
    monkeypatch.chdir(folder)
    run("compress", name, room / "out", "--keep", 0.7, *flags).refused(*words)
    assert list(room.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "flag"),
    [("plan", "--length"), ("plan", "--latency-length"), ("eval", "--eval-length")],
)
def test_images_have_no_length(run, folder, room, command, flag):
    """The mistake: it is taken, and ignored."""
    given = ["--eval", folder / "images"] if command == "eval" else ["-o", room / "p.json"]
    run(command, folder / "vit", *given, flag, 64).refused(flag, "image classifier", "leave it out")
    assert list(room.iterdir()) == []


def test_an_unknown_class_is_named_with_the_nearest(run, folder, room):
    from PIL import Image

    (room / "LABLE_3").mkdir()
    Image.new("RGB", (9, 9)).save(room / "LABLE_3" / "one.png")
    run("plan", folder / "vit", "--calibration", room).refused("LABLE_3", "LABEL_3", "10 classes")


def test_images_without_classes_cannot_be_judged_on(run, near, folder, room):
    from PIL import Image

    for number in range(9):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(room / f"{number}.png")
    out = room.parent / "out"
    run("compress", folder / "vit", out, "--calibration", room).refused("subfolders", "LABEL_0")
    assert not out.exists()


def test_latency_is_a_target(run, folder, source, forget, monkeypatch, name):
    """On a machine that takes a nanosecond a parameter."""
    from secateur.scoring import latency

    def counted(timed, device):
        module = timed.args[0].module if timed.args else timed.func
        return 1e-9 * sum(p.numel() for p in module.parameters())

    forget()
    monkeypatch.setattr(latency, "_timed", counted)
    flags = ["--method", "flap", "--target", "latency", "--keep", "0.8"]
    flags += ["--latency-length", 32] if name == "bert" else []
    shown = run("plan", folder / name, *source[name], *flags, "--dry-run").succeeded().out
    assert ("1 × 32 tokens" if name == "bert" else "ms for a batch of 1 ") in shown
    found = run("plan", folder / name, *source[name], *flags, "--dry-run", "--json").succeeded()
    assert 0.7 < json.loads(found.out)["budget"]["reached"] <= 0.8
