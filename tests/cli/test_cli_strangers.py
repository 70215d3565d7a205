"""Folders and files that strangers have made: no code of theirs runs, nothing leaves the folder."""

import json
import os
import pickle
import shutil
import time

import pytest
import yaml

from tests.support.made_runs import made_run


class Evil:
    """What writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def ran(tmp_path):
    """A file that code of strangers makes when it runs."""
    return tmp_path / "ran"


@pytest.fixture
def code(ran):
    return f"open({str(ran)!r}, 'w').close()\n"


def change(folder, name="config.json", **keys):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def judged(held):
    return ["--eval", held, "--no-speed", "--eval-windows", 2, "--new-tokens", 4]


def test_the_code_beside_a_compressed_checkpoint_is_not_run(
    run, near, compress, room, held, code, ran
):
    """The package has these classes itself."""
    compress("--method", "modegpt", "--keep", "0.8").succeeded()
    for file in (room / "out").glob("*_secateur.py"):
        file.write_text(code + "raise SystemExit('it was run')\n")
    run("eval", room / "out", *judged(held)).succeeded()
    run("inspect", room / "out").succeeded()
    assert not ran.exists()


@pytest.mark.parametrize("known", [True, False])
def test_code_runs_only_where_that_is_asked_for(run, near, broken, held, code, ran, known):
    names = {"AutoConfig": "evil.C", "AutoModel": "evil.M", "AutoModelForCausalLM": "evil.M"}
    (broken / "evil.py").write_text(code)
    change(broken, auto_map=names, **({} if known else {"model_type": "unheard"}))
    change(broken, "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]})
    for command in (["inspect", broken], ["eval", broken, *judged(held)]):
        found = run(*command)
        assert found.code in (0, 2)
        assert not ran.exists()
        if not known:
            found.refused("trust")


def test_pickles_are_never_opened(run, near, broken, held, ran):
    (broken / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.bin", "adapter_model.bin", "model.pt"):
        with (broken / name).open("wb") as file:
            pickle.dump(Evil(ran), file)
    run("eval", broken, *judged(held)).refused("broken", "model.safetensors")
    assert not ran.exists()
    pickle.loads((broken / "model.pt").read_bytes()).close()  # or nothing could have happened
    assert ran.exists()


KEYS = {
    "code for attention": ({"attn_implementation": "someone/kernel:f"}, ["--trust-remote-code"]),
    "code for experts": ({"experts_implementation": {"": "a/b"}}, ["--trust-remote-code"]),
    "another config": ({"configuration_files": ["config.9.0.json"]}, ["configuration_files"]),
    "another weight file": ({"transformers_weights": "../x.safetensors"}, ["transformers_weights"]),
    "a method": ({"to_dict": 1}, ["to_dict", "method"]),
    "a class": ({"__class__": "a"}, ["__class__"]),
    "many layers": ({"num_hidden_layers": 10**9}, ["num_hidden_layers", "1024"]),
    "many heads": ({"num_attention_heads": 2**31}, ["num_attention_heads"]),
    "many classes": ({"num_labels": 10**9}, ["num_labels"]),
    "many words": ({"vocab_size": 10**12}, ["config.json asks for", "not from the same model"]),
    "wide": ({"hidden_size": 2**30}, ["broken"]),
    "wide MLPs": ({"intermediate_size": 10**10}, ["config.json asks for"]),
    "a size beyond numbers": ({"vocab_size": 10**30}, ["vocab_size"]),
    "an endless pattern": (
        {"quantization_config": {"quant_method": "compressed-tensors", "ignore": ["re:(a+)+$"]}},
        ["re:(a+)+$", "repeats a group"],
    ),
    "a long pattern": ({"quantization_config": {"ignore": ["re:.*.*.*.*"]}}, ["too long"]),
}


@pytest.mark.parametrize("name", KEYS)
def test_keys_of_a_config_that_lead_elsewhere_or_beyond_memory_are_refused(
    run, near, broken, held, name
):
    keys, words = KEYS[name]
    change(broken, **keys)
    run("inspect", broken).refused("broken", *words)
    run("eval", broken, *judged(held)).refused("broken", *words)


def test_as_many_layers_as_there_are_tensors_may_be(broken, monkeypatch):
    from secateur.models import config_checks as vetting

    monkeypatch.setattr(vetting, "MAX_PARTS", 1)
    vetting.vet_config("broken", broken / "config.json", False)
    change(broken, num_hidden_layers=50)
    with pytest.raises(ValueError, match="more than 21 can't be meant"):
        vetting.vet_config("broken", broken / "config.json", False)


def test_patterns_of_our_own_checkpoints_are_none_of_those():
    from secateur.models.config_checks import _check_patterns

    target = r"re:(model\.)?model\.layers\.0\.mlp\.down_proj$"
    _check_patterns({"config_groups": {"group_0": {"targets": [target, "re:.*lm_head"]}}})


def test_an_adapter_beside_a_model_is_not_loaded_unseen(run, broken):
    (broken / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')
    run("inspect", broken).refused("adapter", "merge")


def test_a_config_that_is_a_pipe_is_not_waited_for(run, broken):
    (broken / "config.json").unlink()
    os.mkfifo(broken / "config.json")
    run("inspect", broken).refused("config.json")


def test_a_link_in_place_of_a_runs_record_is_not_written_through(run, tmp_path):
    folder = made_run(tmp_path / "run")
    shutil.move(folder / "secateur", tmp_path / "elsewhere")
    (folder / "secateur").symlink_to(tmp_path / "elsewhere")
    run("report", folder).refused("link")
    assert not (tmp_path / "elsewhere" / "report.html").exists()


def test_links_for_pages_and_cards_are_replaced(run, tmp_path):
    folder, outside = made_run(tmp_path / "run"), tmp_path / "outside"
    outside.write_text("mine")
    for place in (folder / "README.md", folder / "secateur" / "report.html"):
        place.symlink_to(outside)
        place.with_name(f".{place.name}.{os.getpid()}.partial").symlink_to(outside)
    run("report", folder).succeeded()
    assert outside.read_text() == "mine"
    assert not (folder / "README.md").is_symlink()


def test_links_that_lead_out_are_not_uploaded(run, tmp_path):
    folder = made_run(tmp_path / "run")
    run("report", folder).succeeded()
    (tmp_path / "secret").write_text("mine")
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    run("push", folder, "me/small").refused("notes.txt", "link")


YAML = {
    "a bomb of aliases": ("a: &a [1, 1]\nsteps: [*a, *a]", ["aliases"]),
    "a tag that runs": ("steps: !!python/object/apply:os.system [id]", ["no YAML"]),
    "a date that is none": ("steps: 2001-99-99", ["no YAML"]),
    "a tag with no text for it": ("steps: !!timestamp x", ["no YAML"]),
    "a number of many digits": ("keep: " + "9" * 5000, ["no YAML"]),
    "a long number": ("keep: " + "9" * 50, ["digits"]),
    "not a number": ("keep: .nan\nsteps: [{method: svd}]", ["nan"]),
    "nested deeply": ("steps: " + "[" * 200, ["deeper"]),
    "a name twice": ("keep: 0.5\nkeep: 0.6\nsteps: []", ["keep", "twice"]),
    "text for a number of bits": ("steps: [{method: rtn, options: {bits: 3.5}}]", ["text"]),
    "many digits as text": (
        "steps: [{method: rtn, options: {bits: '" + "9" * 5000 + "'}}]",
        ["whole numbers"],
    ),
    "a very long name": ("steps: [{method: " + "x" * 50_000 + "}]", ["unknown method"]),
    "no UTF-8": (b"\xff\xfe\x00", ["UTF-8"]),
    "larger than any": (b"#" * 200_000, ["larger than any recipe"]),
}


@pytest.mark.parametrize("name", YAML)
def test_recipes_that_are_more_than_plain_data_are_refused(run, model, text, tmp_path, room, name):
    content, words = YAML[name]
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = run("compress", model, room / "out", "--recipe", file, "--calibration", text)
    found.refused(*words)
    assert len(found.err) < 3000
    assert list(room.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("source", "a\0b", ["a\\x00b"]),
        ("source", "\x1b[2Jx", ["\\x1b[2Jx"]),
        ("seed", 2**64, ["calibration.seed"]),
        ("select", "x" * 5000, ["select"]),
    ],
)
def test_plans_with_odd_calibrations_are_refused(
    run, model, plan, tmp_path, room, key, value, words
):
    content = plan()
    content["calibration"][key] = value
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(content))
    found = run("compress", model, room / "out", "--plan", file)
    found.refused(*words)
    assert "\x1b" not in found.err
    assert len(found.err) < 3000


def test_rows_of_a_plan_by_the_thousand_take_no_time(model, plan):
    from secateur.methods.auto import Auto
    from secateur.models.loading import skeleton
    from secateur.models.model import Settings
    from secateur.planning.checks import match_units
    from secateur.planning.plan import Plan

    made, shapes = Plan.model_validate(plan()), skeleton(str(model), Settings(device="cpu"))
    many = made.model_copy(update={"units": made.units + made.units[:1] * 60_000})
    start = time.perf_counter()
    with pytest.raises(ValueError, match="several rows"):
        match_units(many, shapes, Auto())
    assert time.perf_counter() - start < 5


def test_a_license_of_a_stranger_is_read_as_plain_yaml(tmp_path):
    from secateur.report.model_card import license_of

    for content in ("license: !!timestamp x", "license: 2001-99-99", "a: &a [x]\nlicense: *a"):
        (tmp_path / "README.md").write_text(f"---\n{content}\n---\n")
        assert license_of(str(tmp_path)) is None
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump({'license': 'mit'})}---\n")
    assert license_of(str(tmp_path)) == "mit"


@pytest.fixture
def sweep(run, near, model, text, held):
    """A sweep of one run, looked at only, into a folder."""

    def command(out, *args):
        given = ["--calibration", text, "--keep", 0.9, "--samples", 4, "--length", 32]
        return run("sweep", model, out, *given, *judged(held), *args)

    return command


@pytest.mark.parametrize("place", ["", "statistics", "logs/deeper"])
def test_links_in_what_a_sweep_shares_are_not_written_through(sweep, tmp_path, place):
    """The mistake: a link `.shared` is followed, and folders behind it are removed at the end."""
    out, outside = tmp_path / "out", tmp_path / "outside"
    (outside / "statistics").mkdir(parents=True)
    link = out / ".shared" / place if place else out / ".shared"
    link.parent.mkdir(parents=True)
    link.symlink_to(outside)
    for args in ((), ("--dry-run",)):
        sweep(out, *args).refused("link", str(link))
    assert [path.name for path in outside.iterdir()] == ["statistics"]


@pytest.mark.parametrize("flags", [("--dtype", "Tensor"), ("--device", "cuda:999")])
def test_a_sweep_that_cannot_start_is_not_listed(sweep, tmp_path, flags):
    sweep(tmp_path / "out", "--dry-run", *flags).refused(*flags)


def test_seeds_beyond_numbers_are_refused(run, model, text, room, tmp_path):
    given = ["--calibration", text, "--samples", 4, "--length", 32, "--seed", 10**30]
    run("plan", model, "--dry-run", *given).refused("--seed")
    run("compress", model, room / "out", *given).refused("--seed")
    file = tmp_path / "sweep.yaml"
    file.write_text(f"model: {model}\nruns: [{{method: flap}}]\ncalibration: {{seed: {10**30}}}")
    run("sweep", file, room / "out", "--dry-run").refused("calibration.seed")


def test_homes_of_nobody_are_no_traceback(run, tmp_path, room):
    nobody = "~nobodyx/a"
    file = tmp_path / "sweep.yaml"
    file.write_text(f"model: demo\nruns: [{{recipe: {nobody}}}]")
    run("sweep", file, room / "out", "--dry-run").refused(nobody)
    run("sweep", f"{nobody}.yaml", room / "out", "--dry-run").refused(nobody)
    run("compare", nobody, nobody).refused(nobody)
    run("push", nobody, "me/small").refused(nobody)


@pytest.mark.parametrize("source", ["~nobodyx/a", "x" * 5000, "a\0b", "/" + "y/" * 5000])
def test_a_report_of_an_odd_model_is_shown(run, tmp_path, source):
    folder = made_run(tmp_path / "run")
    path = folder / "secateur" / "report.json"
    content = json.loads(path.read_text())
    content["model"]["source"] = source
    path.write_text(json.dumps(content))
    run("report", folder).succeeded()


def test_messages_about_long_names_are_short(run, room, tmp_path):
    found = run("inspect", "x" * 5000)
    found.refused("too long")
    assert len(found.err) < 1000
    file = tmp_path / "sweep.yaml"
    file.write_text(f"model: {'x' * 5000}\nruns: [{{method: flap}}]")
    found = run("sweep", file, room / "out", "--dry-run")
    found.refused("too long")
    assert len(found.err) < 1000


def test_what_a_run_says_cannot_steer_the_terminal(run, model, monkeypatch):
    from secateur.cli import render as present
    from secateur.utils.errors import RunError

    def fail(*_):
        raise RunError("\x1b[2Jgone")

    monkeypatch.setattr(present, "inspection", fail)
    found = run("inspect", model)
    assert found.code == 1
    assert "\x1b" not in found.err
    assert "\\x1b[2Jgone" in found.err


def test_layers_of_many_experts_are_refused_before_anything_is_built(tmp_path):
    from secateur.models.config_checks import vet_config

    path, jamba = tmp_path / "config.json", {"model_type": "jamba", "num_hidden_layers": 1024}
    path.write_text(json.dumps(jamba | {"num_experts": 1024}))
    with pytest.raises(ValueError, match="1024 layers with 1024 experts"):
        vet_config("it", path, False)
    real = {"num_hidden_layers": 61, "n_routed_experts": 384, "num_experts_per_tok": 8}
    path.write_text(json.dumps(real))
    vet_config("it", path, False)
