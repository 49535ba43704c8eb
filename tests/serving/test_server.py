"""The whole server as processes: the port, the signals, and what is left afterwards."""

from __future__ import annotations

import json
import os
import signal
import socket

import httpx
import pytest

from autoflux.errors import ServiceUnavailable
from autoflux.serving.server import open_port
from tests.serving.running import Running, eventually, fake_server

SLOW = '{"step_seconds": 0.1}'
LOADS_LONG = '{"load_seconds": 60}'


@pytest.mark.parametrize("frontends", [(), ("gradio",)])
def test_it_serves_without_torch_and_leaves_nothing_behind(frontends: tuple[str, ...]):
    with fake_server(*frontends) as server:
        job = server.job(server.order(prompt="a", seed=1), "done")
        if frontends:
            eventually(lambda: httpx.get(server.url).status_code == 200, "the page")
        assert httpx.get(server.url + job["pictures"][0]["url"]).content.startswith(b"\x89PNG")
        assert server.interrupt() == 130
        assert server.output.splitlines()[-1] == "False", server.output
        with socket.create_server(("127.0.0.1", server.port), reuse_port=False):
            pass


def test_orders_are_accepted_before_the_model_is_there():
    with fake_server(behaviour='{"load_seconds": 1}') as server:
        job_id = server.order(prompt="a")
        assert server.get("/health")["state"] in ("starting", "loading")
        assert server.job(job_id, "done")["attempt"] == 1


def test_a_job_outlives_its_worker():
    with fake_server(behaviour=SLOW) as server:
        job_id = server.order(prompt="a", steps=20)
        eventually(lambda: server.get(f"/api/jobs/{job_id}")["step"])
        (worker,) = server.workers()
        worker.kill()
        assert server.job(job_id, "done")["attempt"] == 2


def test_the_stream_of_a_running_job_ends_with_an_event():
    with fake_server(behaviour='{"step_seconds": 0.05}') as server:
        job_id = server.order(prompt="a", steps=10)
        with httpx.stream("GET", f"{server.url}/api/jobs/{job_id}/events", timeout=60) as stream:
            lines = [line for line in stream.iter_lines() if line]
    states = [json.loads(line.removeprefix("data: "))["state"] for line in lines if line.startswith("data: ")]
    assert len(states) > 4
    assert lines[-2:] == ["event: end", 'data: {"state":"done"}']


def _before_the_model(server: Running) -> None:
    server.until("loading")


def _while_idle(server: Running) -> None:
    server.until("ready")


def _while_drawing(server: Running) -> None:
    job_id = server.order(prompt="a", steps=1000)
    eventually(lambda: server.get(f"/api/jobs/{job_id}")["step"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("phase", [_before_the_model, _while_idle, _while_drawing])
def test_it_ends_cleanly_in_every_phase(phase, number: int):
    with fake_server(behaviour=LOADS_LONG if phase is _before_the_model else SLOW) as server:
        phase(server)
        assert server.interrupt(number) == 128 + number
        assert "Traceback" not in server.output, server.output
        assert "Error" not in server.output, server.output


def test_it_ends_while_somebody_watches():
    with fake_server(behaviour=SLOW) as server:
        job_id = server.order(prompt="a", steps=1000)
        with httpx.stream("GET", f"{server.url}/api/jobs/{job_id}/events", timeout=60) as stream:
            lines = stream.iter_lines()
            assert next(lines) == "event: job"
            assert server.interrupt() == 130
            assert "event: end" not in list(lines)
        assert "Traceback" not in server.output


def test_pressing_ctrl_c_again_ends_it_at_once():
    with fake_server(behaviour=SLOW) as server:
        _while_drawing(server)
        os.kill(server.process.pid, signal.SIGINT)
        os.kill(server.process.pid, signal.SIGINT)
        assert server.wait() == 130


def test_a_model_that_was_never_ready_ends_the_program_with_its_error():
    with fake_server(behaviour='{"broken": true}') as server:
        assert server.wait() == 1
        assert "failed: the fake weights are damaged" in server.output


def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServiceUnavailable, match=f"port {port} on 127.0.0.1 is in use") as refused:
            open_port("127.0.0.1", port)
    assert refused.value.hint
    assert f"--port {port + 1}" in refused.value.hint


def test_an_address_of_another_computer_cannot_be_listened_on():
    with pytest.raises(ServiceUnavailable, match=r"cannot listen on 192\.0\.2\.1"):
        open_port("192.0.2.1", 0)


def test_the_port_is_open_before_anything_accepts():
    with open_port("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        pass
