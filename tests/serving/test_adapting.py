"""A service that holds its plan to the prediction: it changes plans between jobs, and back. Times are values."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from autoflux.errors import DoesNotFit, ErrorReport
from autoflux.hardware.values import Hardware
from autoflux.models.request import Order
from autoflux.planning.calibration import Calibration, Setting
from autoflux.planning.fitting import Measured
from autoflux.planning.values import Plan
from autoflux.serving.jobs import JobState, WorkerState
from autoflux.serving.messages import Ended, Load, Ready, Run, Took
from autoflux.serving.service import Service
from autoflux.serving.supervisor import Supervisor
from autoflux.testing import BEHAVIOUR_VARIABLE, Behaviour, fake_model, fake_plan, fake_prepare
from tests.serving.running import eventually

OLD = fake_plan()
NEW = OLD.replace(backend="other", predicted=OLD.predicted.replace(seconds_per_step=0.0005, seconds_per_image=0.003))
DIED = ErrorReport(code="worker_died", message="the worker process was killed by SIGSEGV")
FULL = ErrorReport(code="out_of_memory", message="the device ran out of memory")


class Puppet:
    """A worker that says only what the test makes it say."""

    def __init__(self):
        self.sent = []
        self.loads = []
        self.listener = None

    def start(self, load: Load, listener):
        self.loads.append(load)
        self.listener = listener

    def switch(self, load: Load):
        self.loads.append(load)

    def send(self, message):
        self.sent.append(message)

    def stop(self):
        pass

    @property
    def run(self) -> Run:
        return [message for message in self.sent if isinstance(message, Run)][-1]


@dataclass
class Planner:
    """Plans what the test says."""

    next: Plan = NEW
    error: Exception | None = None
    kept: list[Calibration] = field(default_factory=list)

    def known(self, hardware: Hardware) -> Calibration | None:
        return self.kept[-1] if self.kept else None

    def plan(self, hardware: Hardware, calibration: Calibration) -> Plan:
        if self.error:
            raise self.error
        return self.next

    def keep(self, calibration: Calibration) -> None:
        self.kept.append(calibration)


def measured(step: float) -> Measured:
    """A batch of one picture whose steps took so long each."""
    around = {"begin_seconds": 0.001, "finish_seconds": 0.001, "encoded": False}
    return Measured(width=128, height=128, step_seconds=(step,) * 9, **around)


class Served:
    """A service whose worker is a puppet."""

    def __init__(self, planner: Planner | None):
        self.puppet, self.told = Puppet(), []
        self.service = Service(fake_model(), self.puppet, planner=planner, on_status=self.told.append)
        self.service.start(fake_prepare)
        eventually(lambda: self.puppet.listener)
        self.service.received(Ready(device="cpu"))

    def draw(self, step: float, error: ErrorReport | None = None) -> str:
        """A job of nine steps that took so long each."""
        job = self.service.submit(Order(prompt="a", steps=9))
        self.finish(job.id, step, error)
        return job.id

    def finish(self, job_id: str, step: float, error: ErrorReport | None = None, attempt: int = 1) -> None:
        if self.puppet.run.measured and error is None:
            self.service.received(Took(job_id=job_id, attempt=attempt, measured=measured(step)))
        self.service.received(Ended(job_id=job_id, attempt=attempt, error=error))

    def noted(self, words: str) -> str:
        return eventually(lambda: words in self.service.status().note and self.service.status().note, words)

    def changed(self, count: int) -> Plan:
        """The plan of the last load, as soon as there were so many."""
        return eventually(lambda: len(self.puppet.loads) == count and self.puppet.loads[-1].plan, "a change")


@pytest.fixture
def planner() -> Planner:
    return Planner()


@pytest.fixture
def served(planner: Planner) -> Served:
    return Served(planner)


def test_a_plan_that_holds_is_left_alone_and_not_measured_any_more(served, planner):
    served.draw(OLD.predicted.seconds_per_step * 1.1)
    served.draw(1.0)
    assert not served.puppet.run.measured
    assert (planner.kept, len(served.puppet.loads), served.service.status().note) == ([], 1, "")


def test_without_a_planner_nothing_is_measured():
    served = Served(None)
    served.draw(1.0)
    assert not served.puppet.run.measured


def test_a_plan_that_is_off_is_learned_from_and_kept_if_there_is_no_better(served, planner):
    planner.next = OLD
    served.draw(0.002)
    assert "2.00 times as long as predicted" in served.noted("the plan stays")
    assert planner.kept[-1].blocks[0].factor == pytest.approx(2.0, rel=0.01)
    assert len(served.puppet.loads) == 1
    served.draw(0.002)
    assert not served.puppet.run.measured


def test_a_better_plan_is_changed_to_between_jobs(served):
    running = served.service.submit(Order(prompt="a", steps=9))
    served.finish(running.id, 0.002)
    assert served.changed(2) == NEW
    assert "changing to other on cpu" in served.service.status().note
    assert served.service.plan == NEW
    assert served.service.status().worker is WorkerState.LOADING
    waiting = served.service.submit(Order(prompt="b", steps=9))
    assert served.puppet.run.job_id == running.id
    served.service.received(Ready(device="cpu"))
    assert (served.puppet.run.job_id, served.puppet.run.measured) == (waiting.id, True)


def test_a_job_that_runs_is_not_disturbed_by_a_change(served):
    first = served.service.submit(Order(prompt="a", steps=9))
    second = served.service.submit(Order(prompt="b", steps=9))
    served.service.received(Took(job_id=first.id, attempt=1, measured=measured(0.002)))
    served.noted("changing to")
    assert served.service.job(first.id).state is JobState.RUNNING
    assert (len(served.puppet.loads), served.service.plan) == (1, OLD)
    served.service.received(Ended(job_id=first.id, attempt=1))
    assert served.changed(2) == NEW
    assert served.service.job(second.id).state is JobState.QUEUED
    served.service.received(Ready(device="cpu"))
    assert served.puppet.run.job_id == second.id


def on_trial(served: Served) -> None:
    """Changed to the new plan, which is ready."""
    served.draw(0.002)
    served.changed(2)
    served.service.received(Ready(device="cpu"))


def test_a_new_plan_that_is_faster_stays(served, planner):
    on_trial(served)
    served.draw(0.001)
    served.noted("the new plan stays")
    assert len(served.puppet.loads) == 2
    assert {times.backend for times in planner.kept[-1].blocks} == {"fake", "other"}
    served.draw(9.0)
    assert not served.puppet.run.measured


def test_a_new_plan_that_is_slower_is_left_and_that_is_remembered(served, planner):
    on_trial(served)
    served.draw(0.005)
    assert served.changed(3) == OLD
    assert "the new plan is slower" in served.service.status().note
    (slower,) = planner.kept[-1].slower
    assert (slower.setting, slower.than) == (Setting.of(NEW), Setting.of(OLD))
    served.service.received(Ready(device="cpu"))
    served.draw(0.002)
    assert not served.puppet.run.measured
    assert len(served.puppet.loads) == 3


def test_after_a_new_start_what_was_slower_is_not_tried_again(planner):
    first = Served(planner)
    on_trial(first)
    first.draw(0.005)
    first.changed(3)
    again = Served(planner)
    again.draw(0.002)
    again.noted("the plan stays")
    assert len(again.puppet.loads) == 1


def test_a_new_plan_that_does_not_start_is_left(served, planner):
    served.draw(0.002)
    served.changed(2)
    served.service.lost(DIED, final=False)
    assert served.changed(3) == OLD
    assert "could not be run" in served.service.status().note
    eventually(lambda: planner.kept[-1].slower, "that it is remembered")


def test_a_job_that_lacks_memory_in_a_new_plan_is_drawn_in_the_old_one(served):
    on_trial(served)
    job_id = served.draw(0.0, error=FULL)
    assert served.changed(3) == OLD
    assert served.service.job(job_id).state is JobState.QUEUED
    served.service.received(Ready(device="cpu"))
    assert (served.puppet.run.job_id, served.puppet.run.attempt) == (job_id, 2)
    served.service.received(Ended(job_id=job_id, attempt=2, error=FULL))
    assert served.service.job(job_id).state is JobState.FAILED


def test_a_worker_that_dies_in_its_first_plan_is_started_again_with_it(served):
    served.service.lost(DIED, final=False)
    assert served.service.status().restarts == 1
    served.service.received(Ready(device="cpu"))
    served.draw(0.002)
    assert served.puppet.run.measured


def test_when_planning_again_fails_the_plan_goes_on(served, planner):
    planner.error = DoesNotFit("needs more than there is")
    served.draw(0.002)
    assert "needs more than there is" in served.noted("the plan stays")
    assert served.draw(0.002)


def test_a_real_worker_is_replaced_by_one_with_the_new_plan(monkeypatch):
    monkeypatch.setenv("AUTOFLUX_PLUGINS", "autoflux.testing")
    monkeypatch.setenv(BEHAVIOUR_VARIABLE, Behaviour(step_seconds=0.01).to_json())
    # The fake's steps take ten times what is predicted, and what is planned then differs in name only.
    planner = Planner(next=OLD.replace(attention="cudnn", predicted=NEW.predicted))
    supervisor = Supervisor()
    service = Service(fake_model(), supervisor, planner=planner)
    try:
        service.start(fake_prepare)
        eventually(lambda: service.status().worker is WorkerState.READY, "ready")
        pid = supervisor.pid
        jobs = [service.submit(Order(prompt="a", steps=9)) for _ in range(4)]
        eventually(lambda: service.plan.attention == "cudnn", "the new plan")
        eventually(lambda: all(service.job(job.id).state is JobState.DONE for job in jobs), "the end of all jobs")
        assert supervisor.pid != pid
        assert service.status().restarts == 0
        assert all(service.job(job.id).attempt == 1 for job in jobs)
    finally:
        service.stop()
