"""`autoflux tune` as a user types it, and what later commands make of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from autoflux.cli.main import run
from autoflux.cli.plan_text import KNOWN
from autoflux.cli.tune import Tuning
from autoflux.models.request import Order, make_requests
from autoflux.paths import cache_dir
from autoflux.planning.calibration import CALIBRATION_SCHEMA
from autoflux.planning.fitting import LIMIT
from autoflux.planning.terms import Origin
from autoflux.runtime.calibration_store import FOLDER, VARIABLE, CalibrationStore
from autoflux.testing import BEHAVIOUR_VARIABLE, Behaviour, fake_hardware, fake_model, fake_plan


@pytest.fixture(autouse=True)
def _calibrating(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What runs here is kept, and forgotten after each test."""
    monkeypatch.delenv(VARIABLE)
    yield
    shutil.rmtree(cache_dir() / FOLDER, ignore_errors=True)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOFLUX_PLUGINS", "autoflux.testing")
    monkeypatch.setenv(BEHAVIOUR_VARIABLE, Behaviour(step_seconds=0.01).to_json())


def said(capsys) -> dict:
    return json.loads(capsys.readouterr().out)["data"]


def planned(model: Path, capsys, *arguments: str) -> dict:
    assert run(["plan", "--model", str(model), "--device", "cpu", "--json", *arguments]) == 0
    return said(capsys)


def test_a_plan_by_what_ran_here_is_explained(tiny_model: Path, capsys):
    command = ["--model", str(tiny_model), "--device", "cpu", "--backend", "diffusers"]
    assert run(["tune", *command, "--steps", "1"]) == 0
    capsys.readouterr()
    assert run(["plan", *command, "--explain"]) == 0
    assert f"prediction: calibrated  {KNOWN[Origin.CALIBRATED]}" in capsys.readouterr().out


def test_how_a_choice_is_known_has_words_for_every_way():
    assert set(KNOWN) == set(Origin)


def test_what_is_measured_is_what_later_plans_predict(tiny_model: Path, capsys):
    before = planned(tiny_model, capsys, "--backend", "diffusers")
    assert before["calibrated"] is None
    command = ["tune", "--model", str(tiny_model), "--device", "cpu", "--backend", "diffusers"]
    assert run([*command, "--steps", "2", "--json"]) == 0
    data = said(capsys)
    (trial,) = data["trials"]
    assert trial["fastest"] is True
    assert len(trial["measured"]["step_seconds"]) == 3
    assert trial["predicted"]["seconds_per_step"] == before["predicted"]["seconds_per_step"]
    assert Path(data["kept"]).is_file()
    after = planned(tiny_model, capsys, "--backend", "diffusers")
    assert after["calibrated"]["steps"] == 2
    factor = trial["seconds_per_step"] / before["predicted"]["seconds_per_step"]
    corrected = before["predicted"]["seconds_per_step"] * min(max(factor, 1 / LIMIT), LIMIT)
    assert after["predicted"]["seconds_per_step"] == pytest.approx(corrected, rel=0.01)
    for what_if in (["--disk", "1GB/s"], ["--on", "rtx-3060-12gb"]):
        assert planned(tiny_model, capsys, "--backend", "diffusers", *what_if)["calibrated"] is None


def test_a_damaged_calibration_is_a_warning_and_written_anew(tiny_model: Path, capsys, fakes):
    command = ["tune", "--model", str(tiny_model), "--device", "cpu", "--backend", "fake", "--steps", "1", "--json"]
    assert run(command) == 0
    kept = Path(said(capsys)["kept"])
    whole = kept.read_text()
    kept.write_text(whole[:-20])
    assert "ignored" in " ".join(planned(tiny_model, capsys, "--backend", "fake")["warnings"])
    assert run(command) == 0
    assert "ignored" in capsys.readouterr().err
    assert planned(tiny_model, capsys, "--backend", "fake")["warnings"] == []
    assert json.loads(kept.read_text())["schema"] == CALIBRATION_SCHEMA


def test_people_see_a_table(tiny_model: Path, capsys, fakes):
    assert run(["tune", "--model", str(tiny_model), "--device", "cpu", "--backend", "fake", "--steps", "2"]) == 0
    shown = capsys.readouterr()
    assert "the fastest: fake on cpu, all weights there, float32" in shown.out
    assert "predicted" in shown.out
    assert "plan 1 of 1" in shown.err


def test_one_plan_that_fails_does_not_stop_the_others(fakes, tmp_path, capsys):
    model = fake_model()
    requests = make_requests(model, Order(prompt="a", seed=0, steps=3))
    tuning = Tuning(model, fake_hardware(), requests, None, None, CalibrationStore(tmp_path))
    good = fake_plan()
    tuning.run([good.replace(backend="unknown"), good, good.replace(attention="cudnn")])
    assert [trial.error is None for trial in tuning.trials] == [False, True, True]
    kept, warning = CalibrationStore(tmp_path).load(fake_hardware(), model)
    assert (kept.tuned.plans, warning) == (2, None)
    assert tuning.best.plan in (good, good.replace(attention="cudnn"))
    assert "no backend named 'unknown'" in capsys.readouterr().err


def test_when_none_can_be_run_the_reason_is_the_error(tiny_model: Path, capsys, fakes, monkeypatch):
    monkeypatch.setenv(BEHAVIOUR_VARIABLE, Behaviour(broken=True).to_json())
    command = ["tune", "--model", str(tiny_model), "--device", "cpu", "--backend", "fake", "--json"]
    assert run(command) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["code"], error["hint"]) == ("tuning_failed", "fetch them again")
    assert "the fake weights are damaged" in error["message"]
    assert planned(tiny_model, capsys)["calibrated"] is None


def test_nothing_is_kept_where_nothing_is_to_be_known(tiny_model: Path, capsys, fakes, monkeypatch):
    monkeypatch.setenv(VARIABLE, "off")
    command = ["tune", "--model", str(tiny_model), "--device", "cpu", "--backend", "fake", "--steps", "1", "--json"]
    assert run(command) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["data"]["kept"] is None
    assert "AUTOFLUX_CALIBRATION is off" in captured.err
    assert not (cache_dir() / FOLDER).exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--plans", "0"], 2, "--plans"),
        (["--steps", "-3"], 2, "--steps"),
        (["--size", "100"], 2, "multiple of 16"),
        (["--ram", "1MB"], 3, "needs"),
        (["--model", "no such model"], 2, "no model named"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(capsys, arguments, code, words):
    assert run(["tune", "--device", "cpu", *arguments]) == code
    assert words in capsys.readouterr().err.replace("\n", " ")


def test_interrupted_it_ends_with_130_and_nothing_of_it_is_left(tiny_model: Path):
    behaviour = Behaviour(step_seconds=1.0).to_json()
    command = [sys.executable, "-m", "autoflux", "tune", "--model", str(tiny_model), "--device", "cpu"]
    process = subprocess.Popen(
        [*command, "--backend", "fake", "--steps", "100"],
        env={**os.environ, "AUTOFLUX_PLUGINS": "autoflux.testing", BEHAVIOUR_VARIABLE: behaviour, "TERM": "dumb"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    children = _children(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    _out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    assert not [child for child in children if child.is_running() and child.status() != "zombie"]


def _children(pid: int):
    """Those of the process, as soon as its worker is there."""
    import psutil

    from tests.serving.running import eventually

    parent = psutil.Process(pid)
    return eventually(
        lambda: [c for c in parent.children(recursive=True) if "spawn_main" in " ".join(c.cmdline())], "a worker"
    )
