"""The worker process: that it draws, and every way it can end."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from dataclasses import dataclass, field

import psutil
import pytest
from PIL import Image

from autoflux.errors import AutofluxError, DamagedPack, OutOfMemory
from autoflux.models.request import Order, make_requests
from autoflux.runtime.session import Session
from autoflux.serving import worker
from autoflux.serving.jobs import Job, JobState, WorkerState
from autoflux.serving.messages import Ended, FromWorker, Load, Loading, Run, Started
from autoflux.serving.process import Deadlines
from autoflux.serving.service import Service
from autoflux.serving.supervisor import MAX_FAILURES, Supervisor
from autoflux.testing import (
    BEHAVIOUR_VARIABLE,
    BUG,
    CRASH,
    FAIL,
    HANG,
    Behaviour,
    FakePipeline,
    draw,
    fake_model,
    fake_prepare,
)
from tests.serving.running import eventually

SLOW = Behaviour(step_seconds=0.05)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch):
    """Start a service with a real worker process that acts like that."""
    services = []

    def start(behaviour: Behaviour | None = None, *, ready: bool = True, on_failed=None, **deadlines: float) -> Service:
        monkeypatch.setenv("AUTOFLUX_PLUGINS", "autoflux.testing")
        monkeypatch.setenv(BEHAVIOUR_VARIABLE, (behaviour or Behaviour()).to_json())
        supervisor = Supervisor(Deadlines(**deadlines), first_pause_seconds=0.01)
        service = Service(fake_model(), supervisor)
        service.supervisor = supervisor
        services.append(service)
        service.start(fake_prepare, on_failed)
        if ready:
            eventually(lambda: service.status().worker is WorkerState.READY, "ready")
        return service

    yield start
    for service in services:
        service.stop()


def done(service: Service, job: Job) -> Job:
    return eventually(lambda: (now := service.job(job.id)).state.finished and now, "the end of the job")


def running(service: Service, job: Job, step: int = 1) -> Job:
    return eventually(lambda: (now := service.job(job.id)).step >= step and now, "a step")


def test_it_draws_what_was_ordered_with_metadata(start):
    service = start()
    job = done(service, service.submit(Order(prompt="a", seed=3, count=6)))
    assert (job.state, job.step, job.attempt) == (JobState.DONE, 24, 1)
    assert sorted(drawn.index for drawn in job.pictures) == list(range(6))
    for drawn in job.pictures:
        image = Image.open(io.BytesIO(service.picture(job.id, drawn.index)))
        assert image.tobytes() == draw(job.requests[drawn.index]).tobytes()
        assert f"Seed: {drawn.seed}" in image.info["parameters"]


def test_a_running_job_is_cancelled_between_two_steps(start):
    service = start(SLOW)
    job = service.submit(Order(prompt="a", steps=1000))
    waiting = service.submit(Order(prompt="b"))
    running(service, job)
    service.cancel(job.id)
    assert done(service, job).state is JobState.CANCELLED
    assert service.job(job.id).step < 1000
    assert done(service, waiting).state is JobState.DONE


def test_a_job_survives_the_death_of_its_worker(start):
    service = start(SLOW)
    job = service.submit(Order(prompt="a", steps=30))
    running(service, job)
    os.kill(service.supervisor.pid, signal.SIGKILL)
    job = done(service, job)
    assert (job.state, job.attempt) == (JobState.DONE, 2)
    assert service.status().restarts == 1
    assert service.status().error is None


def test_a_job_that_kills_its_worker_every_time_fails_and_the_next_one_runs(start):
    service = start()
    bad, good = service.submit(Order(prompt=CRASH)), service.submit(Order(prompt="a"))
    failed = done(service, bad)
    assert (failed.state, failed.attempt) == (JobState.FAILED, 3)
    assert "exit code 9" in failed.error.message
    assert failed.error.hint == "its last words: crashing, as the prompt asks"
    assert done(service, good).state is JobState.DONE


def test_a_hanging_worker_is_replaced(start):
    service = start(step_seconds=0.5)
    job = service.submit(Order(prompt=HANG))
    eventually(lambda: service.job(job.id).attempt == 2, "a second attempt")
    assert service.status().restarts == 1
    service.cancel(job.id)
    assert done(service, job).state is JobState.CANCELLED


def test_a_stopped_worker_is_replaced_while_idle(start):
    service = start(idle_seconds=1.5)
    pid = service.supervisor.pid
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: service.status().restarts, "a restart")
    eventually(lambda: not psutil.pid_exists(pid), "the end of the stopped one")


def test_an_error_on_purpose_fails_the_job_and_leaves_the_worker(start):
    service = start()
    pid = service.supervisor.pid
    job = done(service, service.submit(Order(prompt=FAIL)))
    assert (job.state, job.error.code) == (JobState.FAILED, "out_of_memory")
    assert done(service, service.submit(Order(prompt="a"))).state is JobState.DONE
    assert service.supervisor.pid == pid


def test_an_unexpected_error_fails_the_job_and_makes_a_fresh_worker(start):
    service = start()
    pid = service.supervisor.pid
    job = done(service, service.submit(Order(prompt=BUG)))
    assert (job.state, job.error.code, job.attempt) == (JobState.FAILED, "internal", 1)
    assert "this is a bug" in job.error.message
    assert done(service, service.submit(Order(prompt="a"))).state is JobState.DONE
    assert service.supervisor.pid != pid


def test_a_model_that_cannot_be_built_is_not_tried_again(start):
    told = []
    service = start(Behaviour(broken=True), ready=False, on_failed=told.append)
    eventually(lambda: told)
    assert told[0].code == "damaged_checkpoint"
    assert (told[0].message, told[0].hint) == ("the fake weights are damaged", "fetch them again")
    assert service.status().worker is WorkerState.FAILED
    assert service.status().restarts == 0


def test_it_gives_up_on_a_worker_that_never_gets_ready(start):
    told = []
    service = start(Behaviour(load_seconds=60), ready=False, on_failed=told.append)
    seen = set()

    def kill_the_next() -> bool:
        pid = service.supervisor.pid
        if pid and pid not in seen:
            seen.add(pid)
            os.kill(pid, signal.SIGKILL)
        return bool(told)

    eventually(kill_the_next)
    assert len(seen) == MAX_FAILURES
    assert "killed" in told[0].message


def test_stopping_ends_the_worker_while_it_loads(start):
    service = start(Behaviour(load_seconds=60), ready=False)
    eventually(lambda: service.status().stage == "loading the fake")
    pid = service.supervisor.pid
    service.stop()
    assert not psutil.pid_exists(pid)
    assert service.status().worker is WorkerState.STOPPED


def test_stopping_twice_and_before_starting_is_harmless():
    service = Service(fake_model())
    service.stop()
    service.stop()


def test_a_process_that_cannot_be_started_is_a_failure(monkeypatch: pytest.MonkeyPatch):
    told = []
    monkeypatch.setattr("tempfile.tempdir", "/no/such/folder")
    service = Service(fake_model())
    service.start(fake_prepare, told.append)
    eventually(lambda: told)
    assert service.status().worker is WorkerState.FAILED
    service.stop()


@pytest.mark.parametrize("when", ["loading", "drawing"])
def test_the_worker_ends_when_its_service_is_killed(when: str):
    program = textwrap.dedent(f"""
        import time
        from autoflux.models.request import Order
        from autoflux.serving.service import Service
        from autoflux.serving.supervisor import Supervisor
        from autoflux.testing import fake_model, fake_prepare

        if __name__ == "__main__":
            supervisor = Supervisor()
            service = Service(fake_model(), supervisor)
            service.start(fake_prepare)
            job = service.submit(Order(prompt="a", steps=1000))
            while not (service.job(job.id).step if {when == "drawing"} else service.status().progress):
                time.sleep(0.01)
            print(supervisor.pid, flush=True)
            time.sleep(600)
    """)
    behaviour = Behaviour(load_seconds=60 if when == "loading" else 0, step_seconds=0.1)
    environment = {"AUTOFLUX_PLUGINS": "autoflux.testing", BEHAVIOUR_VARIABLE: behaviour.to_json()}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    ) as parent:
        pid = int(parent.stdout.readline())
        parent.kill()
    eventually(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


@dataclass
class Listening:
    """What a worker has been told while it loads, and what it says."""

    coming: tuple[str, ...] = ()
    said: list[FromWorker] = field(default_factory=list)

    def send(self, message: FromWorker) -> None:
        self.said.append(message)

    def cancelled(self, _job_id: str) -> bool:
        return False

    @property
    def stages(self) -> list[str]:
        return [message.stage for message in self.said if isinstance(message, Loading)]


@pytest.mark.parametrize(
    ("coming", "wished", "warms_up"), [((), True, True), ((), False, False), (("a cat",), True, False)]
)
def test_a_job_that_waits_is_the_warm_up(monkeypatch, coming, wished, warms_up):
    monkeypatch.setenv("AUTOFLUX_PLUGINS", "autoflux.testing")
    prepared = fake_prepare(lambda _stage: None)
    listening = Listening(coming)
    load = Load(plan=prepared.plan, model=prepared.model, warm_up=wished)
    worker._load(load, listening, listening)
    assert ("drawing a first step" in listening.stages) == warms_up
    assert listening.stages[:2] == ["starting", "loading the fake"]


@pytest.mark.parametrize("measured", [True, False])
def test_nothing_is_taken_beforehand_in_a_job_that_is_measured(measured):
    prepared, listening = fake_prepare(lambda _stage: None), Listening()
    session = Session(FakePipeline(), prepared.plan, prepared.model, measured=not measured)
    requests = make_requests(prepared.model, Order(prompt="a"))
    worker._run(session, Run(job_id="1", attempt=1, requests=requests, measured=measured), listening, listening)
    assert session.measured == measured


class Spoilt(FakePipeline):
    """Meets what is damaged when it encodes."""

    def __init__(self, error: AutofluxError) -> None:
        super().__init__()
        self.error = error

    def encode(self, prompts):
        raise self.error


@pytest.mark.parametrize(
    ("error", "goes_on"),
    [(DamagedPack("a bit flipped"), False), (OutOfMemory("no room"), True)],
    ids=["pack", "memory"],
)
def test_a_damaged_pack_fails_the_job_and_makes_a_fresh_worker(error, goes_on):
    prepared, listening = fake_prepare(lambda _stage: None), Listening()
    session = Session(Spoilt(error), prepared.plan, prepared.model)
    run = Run(job_id="1", attempt=1, requests=make_requests(prepared.model, Order(prompt="a")))
    with nullcontext() if goes_on else pytest.raises(DamagedPack):
        worker._run(session, run, listening, listening)
    started, ended = listening.said
    assert isinstance(started, Started)
    assert isinstance(ended, Ended)
    assert ended.error == error.report()
