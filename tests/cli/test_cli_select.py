"""``--select-calibration``: what is chosen is in the plan, and a plan brings it along."""

import json

import pytest

GIVEN = ("--method", "flap", "--keep", 0.7, "--samples", 4, "--length", 32)


@pytest.fixture
def planned(run, model, text, room):
    """A plan file and its calibration."""

    def made(select, *flags):
        path = room / f"{select}.json"
        chosen = ("--select-calibration", select, "-o", path, "--overwrite")
        shown = run("plan", model, "--calibration", text, *GIVEN, *chosen, *flags).succeeded()
        return path, json.loads(path.read_text())["calibration"], shown.err

    return made


@pytest.mark.parametrize("select", ["kl", "leverage", "dpp"])
def test_plans_name_the_windows_and_make_the_same_choice_again(planned, forget, select):
    forget()
    _, calibration, said = planned(select)
    assert calibration["select"] == select
    assert len(set(calibration["windows"])) == 4
    assert f"4 windows chosen by {select}" in said
    forget()
    assert planned(select)[1] == calibration
    _, random, _ = planned("none")
    assert random["select"] == "none"
    assert random["windows"] == []


def test_a_plan_brings_its_windows(planned, run, near, model, held, room, forget, monkeypatch):
    path, calibration, _ = planned("dpp")
    forget()
    monkeypatch.setattr(
        "secateur.scoring.calibration_selection.MiddleStates", None
    )  # nothing is chosen again
    judged = ("--eval", held, "--eval-windows", 2, "--new-tokens", 4, "--no-speed")
    done = run("compress", model, room / "out", "--plan", path, *judged).succeeded()
    assert "note: this plan was made from other" not in done.err
    record = room / "out" / "secateur"
    assert json.loads((record / "plan.json").read_text())["calibration"] == calibration
    assert json.loads((record / "report.json").read_text())["calibration"] == calibration
    assert "select: dpp" in (record / "recipe.yaml").read_text()


def test_compress_chooses_too(compress, room):
    compress("--method", "flap", "--select-calibration", "leverage").succeeded()
    report = json.loads((room / "out" / "secateur" / "report.json").read_text())
    assert report["calibration"]["select"] == "leverage"
    assert len(report["calibration"]["windows"]) == 4
    assert report["seconds"]["select"] > 0


def test_draws_keep_their_statistics_where_the_run_does(planned, tmp_path, forget, monkeypatch):
    from secateur.scoring import calibration_selection as select

    seen, whole = [], select.calibrate

    def calibrate(model, tokens, needs, store):
        seen.append(store.folder.parent)
        whole(model, tokens, needs, store)

    monkeypatch.setattr(select, "calibrate", calibrate)
    forget()
    planned("kl", "--statistics", tmp_path / "kept")
    assert set(seen) == {tmp_path / "kept"}
    assert all(path.is_file() for path in (tmp_path / "kept").iterdir())


def test_what_cannot_be_chosen_is_refused(run, model, text, planned, room):
    refused = run("plan", model, "--select-calibration", "lverage", "-o", room / "p.json")
    refused.refused("--select-calibration", "did you mean 'leverage'")
    many = ("--calibration", text, *GIVEN[:4], "--samples", 5000, "--length", 32)
    refused = run("plan", model, *many, "--select-calibration", "dpp", "-o", room / "p.json")
    refused.refused("too short to choose from", "fewer --samples")
    path, _, _ = planned("none")
    refused = run("compress", model, room / "out", "--plan", path, "--select-calibration", "dpp")
    refused.refused("--select-calibration", "--plan")


@pytest.mark.parametrize("select", ["kl", "leverage", "dpp"])
def test_a_plan_that_does_not_name_its_chosen_windows_is_refused(run, planned, model, room, select):
    """The mistake: windows are drawn at random instead, and the record says that they were not."""
    path, _, _ = planned("none")
    plan = json.loads(path.read_text())
    plan["calibration"]["select"] = select
    path.write_text(json.dumps(plan))
    refused = run("compress", model, room / "out", "--plan", path)
    refused.refused("calibration.windows", repr(select), "'none'", "secateur plan")
