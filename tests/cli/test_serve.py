"""`autoflux serve` as users run it."""

from __future__ import annotations

import shutil
import signal
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from autoflux.cli import serve
from autoflux.cli.main import run
from autoflux.errors import ErrorReport
from autoflux.hardware.load import MOST_DISTURBED
from autoflux.hookspecs import hookimpl
from autoflux.paths import cache_dir
from autoflux.planning.values import Plan
from autoflux.plugin_manager import load_plugins
from autoflux.runtime.calibration_store import FOLDER
from autoflux.serving.jobs import Status, WorkerState
from autoflux.testing import FakeDesk
from tests.serving.running import running


def serving(model: Path, *arguments: str, behaviour: str = "{}", **environment: str):
    """`autoflux serve` of that model with the fake backend on a free port."""
    if "--port" not in arguments:
        arguments = (*arguments, "--port", "0")
    backend = () if "--plan" in arguments else ("--backend", "fake")
    command = ("-m", "autoflux", "serve", "--model", str(model), *backend, *arguments)
    return running(*command, behaviour=behaviour, **environment)


def test_it_tells_where_it_is_and_how_to_get_there(tiny_model: Path):
    with serving(tiny_model, "--frontend", "api") as server:
        address = server.port
        server.line(f"ssh -N -L {address}:127.0.0.1:{address} ")
        server.line("loading the fake")
        server.line("ready: tiny")
        job = server.job(server.order(prompt="a"), "done")
        assert job["pictures"]
        assert server.interrupt() == 130
        assert "Traceback" not in server.output


@pytest.mark.parametrize(("calibration", "given"), [("on", False), ("off", False), ("on", True)])
def test_a_plan_that_is_not_as_predicted_is_learned_from_unless_it_was_given(
    tiny_model: Path,
    tmp_path: Path,
    calibration: str,
    given: bool,  # noqa: FBT001
):
    saved = tmp_path / "plan.json"
    if given:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AUTOFLUX_PLUGINS", "autoflux.testing")
            options = ["--model", str(tiny_model), "--device", "cpu", "--backend", "fake", "--save", str(saved)]
            assert run(["plan", *options]) == 0
    wished = ["--plan", str(saved)] if given else ["--device", "cpu"]
    # The cache holds the probe of the other tests; what is learned here is forgotten.
    with serving(
        tiny_model, "--frontend", "api", *wished, behaviour='{"step_seconds": 0.2}', AUTOFLUX_CALIBRATION=calibration
    ) as server:
        judged = calibration == "on" and not given
        # Pictures that are drawn while others compute, as tests do, are not judged, except after some of them.
        for _ in range(1 + MOST_DISTURBED if judged else 1):
            server.job(server.order(prompt="a", steps=10), "done")
        if judged:
            server.line("times as long as predicted, calibrated; the plan stays")
        assert ("calibrated" in server.get("/api/status")["note"]) == judged
        assert server.interrupt() == 130
    shutil.rmtree(cache_dir() / FOLDER, ignore_errors=True)


@pytest.mark.parametrize("moment", ["autoflux: serving", "127.0.0.1:", "loading the fake", "ready: "])
def test_ctrl_c_ends_it_at_any_moment(tiny_model: Path, moment: str):
    loads_long = '{"load_seconds": 60}' if moment == "loading the fake" else "{}"
    with serving(tiny_model, "--frontend", "gradio", behaviour=loads_long) as server:
        server.line(moment)
        assert server.interrupt() == 130
        assert "Traceback" not in server.output, server.output


def test_sigterm_ends_it_too(tiny_model: Path):
    with serving(tiny_model, "--frontend", "api") as server:
        server.line("ready: ")
        assert server.interrupt(signal.SIGTERM) == 128 + signal.SIGTERM
        assert "Traceback" not in server.output


def test_weights_that_cannot_be_loaded_end_it_with_the_reason(tiny_model: Path):
    with serving(tiny_model, "--frontend", "api", behaviour='{"broken": true}') as server:
        assert server.wait() == 1
        assert "error: the fake weights are damaged" in server.output
        assert "fetch them again" in server.output


def test_a_model_that_does_not_fit_ends_it_with_exit_code_3(tiny_model: Path):
    with serving(tiny_model, "--frontend", "api", "--ram", "1MB") as server:
        assert server.wait() == 3
        told = server.output.replace("\n", " ")
        assert told.count("needs") == told.count("error:") == 1, server.output
        assert "failed:" not in server.output


@pytest.fixture
def saved(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plan of this machine for the fake backend."""
    monkeypatch.setenv("AUTOFLUX_PLUGINS", "autoflux.testing")
    assert run(["plan", "--model", str(tiny_model), "--backend", "fake", "--save", str(tmp_path / "plan.json")]) == 0
    return tmp_path / "plan.json"


def test_a_saved_plan_is_followed_and_brings_its_model(saved: Path):
    with running("-m", "autoflux", "serve", "--plan", str(saved), "--frontend", "api", "--port", "0") as server:
        server.line("ready: tiny")
        assert server.interrupt() == 130


def test_a_plan_of_another_machine_ends_it_with_the_reason(saved: Path):
    plan = Plan.from_json(saved.read_bytes())
    saved.write_text(plan.replace(machine="rtx-3060-12gb", fingerprint="that").to_json())
    with running("-m", "autoflux", "serve", "--plan", str(saved), "--frontend", "api", "--port", "0") as server:
        assert server.wait() == 2
        assert "for another machine, 'rtx-3060-12gb'" in server.output.replace("\n", " ")


def test_a_damaged_plan_is_refused_before_the_port_is_opened(saved: Path, capfd: pytest.CaptureFixture[str]):
    saved.write_text(saved.read_text()[:200])
    capfd.readouterr()
    assert run(["serve", "--plan", str(saved), "--frontend", "api", "--port", "0"]) == 1
    told = capfd.readouterr().err
    assert "not JSON" in told
    assert "http" not in told


def test_listening_on_all_addresses_is_warned_about(tiny_model: Path):
    with serving(tiny_model, "--frontend", "api", "--host", "0.0.0.0") as server:
        server.line("warning: anyone who can reach this computer")
        assert server.interrupt() == 130


def test_a_port_in_use_is_refused_before_anything_is_loaded(tiny_model: Path, capfd: pytest.CaptureFixture[str]):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code = run(["serve", "--model", str(tiny_model), "--frontend", "api", "--port", str(port)])
    told = capfd.readouterr().err
    assert code == 1
    assert f"port {port} on 127.0.0.1 is in use" in told
    assert f"--port {port + 1}" in told
    assert "serving" not in told


def test_a_frontend_given_twice_counts_once():
    plugins = load_plugins(entry_points=False)
    assert [frontend.name for frontend in serve._frontends(plugins, ["gradio", "api", "gradio", "api"])] == ["gradio"]


def test_a_failure_is_told_by_the_command_before_the_server_was_ready_and_by_the_server_after(
    capfd: pytest.CaptureFixture[str],
):
    failed = Status(worker=WorkerState.FAILED, error=ErrorReport(code="failed", message="no luck"))
    with FakeDesk() as desk:
        tell = serve._narrator(lambda: desk)
        tell(failed)
        assert capfd.readouterr().err == ""
        tell(Status(worker=WorkerState.READY))
        tell(failed)
    assert capfd.readouterr().err.splitlines()[-1] == "failed: no luck"


def test_an_unknown_frontend_is_named_with_the_closest(capfd: pytest.CaptureFixture[str]):
    assert run(["serve", "--frontend", "gradoi"]) == 2
    assert "did you mean 'gradio'?" in capfd.readouterr().err


def test_a_frontend_whose_packages_are_missing_gives_the_command(capfd: pytest.CaptureFixture[str]):
    class Absent:
        name, description = "absent", "needs what is not there"

        def missing(self):
            return "pip install absent"

    class Plugin:
        @hookimpl
        def register_frontends(self, register):
            register(Absent())

    assert run(["serve", "--frontend", "absent"], load_plugins(Plugin())) == 1
    assert "pip install absent" in capfd.readouterr().err


def test_a_model_that_is_not_there_is_refused_at_once(capfd: pytest.CaptureFixture[str]):
    assert run(["serve", "--frontend", "api", "--model", "/no/such/folder"]) == 1
    told = capfd.readouterr().err
    assert "no model at '/no/such/folder'" in told
    assert "serving" not in told


def test_a_port_that_is_none_is_a_usage_error():
    result = CliRunner().invoke(serve.command, ["--port", "70000"], obj=load_plugins(entry_points=False))
    assert result.exit_code == 2


def test_over_ssh_the_tunnel_command_has_the_real_names(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.2 50000 10.0.0.9 2222")
    monkeypatch.setattr("getpass.getuser", lambda: "ada")
    assert serve._tunnel("127.0.0.1", 6006) == "ssh -N -L 6006:127.0.0.1:6006 -p 2222 ada@10.0.0.9"
    monkeypatch.delenv("SSH_CONNECTION")
    assert serve._tunnel("127.0.0.1", 6006) == "ssh -N -L 6006:127.0.0.1:6006 USER@HOST"
