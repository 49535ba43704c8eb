"""The queue: what is accepted, in what order it runs, and what becomes of late results."""

from __future__ import annotations

import asyncio
import itertools
import threading

import pytest

from autoflux.errors import DoesNotFit, ErrorReport, InvalidRequest, NotKept, QueueFull, ServiceUnavailable
from autoflux.models.request import Order
from autoflux.serving.jobs import Job, JobState, WorkerState
from autoflux.serving.messages import (
    Broken,
    Cancel,
    Coming,
    Ended,
    Finished,
    Load,
    Loading,
    Ready,
    Run,
    Started,
    Stepped,
)
from autoflux.serving.service import MAX_ATTEMPTS, Service
from autoflux.serving.store import MemoryStore
from autoflux.testing import Behaviour, FakeDesk, draw, fake_model, fake_prepare
from tests.serving.running import eventually

DIED = ErrorReport(code="worker_died", message="the worker process was killed by SIGSEGV")


class Puppet:
    """A worker that says only what the test makes it say."""

    def __init__(self):
        self.sent = []
        self.listener = None
        self.stopped = False

    def start(self, load: Load, listener):
        self.load, self.listener = load, listener

    def send(self, message):
        self.sent.append(message)

    def stop(self):
        self.stopped = True

    def runs(self) -> list[Run]:
        return [message for message in self.sent if isinstance(message, Run)]


@pytest.fixture
def puppet() -> Puppet:
    return Puppet()


@pytest.fixture
def service(puppet: Puppet) -> Service:
    ticks = itertools.count(1000)
    service = Service(fake_model(), puppet, max_queued=3, clock=lambda: float(next(ticks)))
    service.start(fake_prepare)
    eventually(lambda: puppet.listener)
    return service


def finished(job: Job, index: int = 0, attempt: int = 1) -> Finished:
    return Finished(job_id=job.id, attempt=attempt, index=index, png=b"png", seconds=1.0)


def test_a_job_is_accepted_while_loading_and_runs_when_ready(service: Service, puppet: Puppet):
    service.received(Loading(stage="transformer", progress=0.5))
    job = service.submit(Order(prompt="a", seed=1))
    assert (job.state, job.position, puppet.runs()) == (JobState.QUEUED, 0, [])
    assert (service.status().worker, service.status().stage, service.status().queued) == ("loading", "transformer", 1)
    service.received(Ready(device="cpu"))
    assert puppet.runs() == [Run(job_id=job.id, attempt=1, requests=job.requests)]
    assert service.job(job.id).state is JobState.RUNNING


def test_jobs_run_first_come_first_served_and_know_their_place(service: Service, puppet: Puppet):
    service.received(Ready(device="cpu"))
    jobs = [service.submit(Order(prompt=prompt)) for prompt in "abc"]
    assert [service.job(job.id).position for job in jobs] == [None, 1, 2]
    service.received(Ended(job_id=jobs[0].id, attempt=1))
    assert [service.job(job.id).position for job in jobs] == [None, None, 1]
    assert [run.job_id for run in puppet.runs()] == [jobs[0].id, jobs[1].id]


def test_progress_and_pictures_arrive(service: Service):
    service.received(Ready(device="cpu"))
    job = service.submit(Order(prompt="a", seed=5, count=2))
    service.received(Started(job_id=job.id, attempt=1))
    service.received(Stepped(job_id=job.id, attempt=1, step=3))
    service.received(finished(job, 1))
    now = service.job(job.id)
    assert (now.step, now.steps, [drawn.seed for drawn in now.pictures]) == (3, 8, [6])
    assert service.picture(job.id, 1) == b"png"
    with pytest.raises(NotKept, match="no picture 0"):
        service.picture(job.id, 0)
    service.received(Ended(job_id=job.id, attempt=1))
    assert service.job(job.id).state is JobState.DONE


def test_every_change_has_a_higher_version_and_times_come_from_the_clock(service: Service):
    service.received(Ready(device="cpu"))
    job = service.submit(Order(prompt="a"))
    service.received(Ended(job_id=job.id, attempt=1))
    done = service.job(job.id)
    assert done.version == 2
    assert [done.created_at, done.started_at, done.finished_at] == [1000.0, 1001.0, 1002.0]


def test_too_many_waiting_jobs_are_refused(service: Service):
    for _ in range(3):
        service.submit(Order(prompt="a"))
    with pytest.raises(QueueFull, match="3 jobs are waiting"):
        service.submit(Order(prompt="a"))


@pytest.mark.parametrize(
    ("order", "param"),
    [(Order(prompt=" "), "prompt"), (Order(prompt="a", steps=0), "steps"), (Order(prompt="a", width=100), "width")],
)
def test_what_the_model_cannot_do_is_refused(service: Service, order: Order, param: str):
    with pytest.raises(InvalidRequest) as refused:
        service.submit(order)
    assert refused.value.param == param
    with pytest.raises(InvalidRequest):
        service.submit_requests((service.submit(Order(prompt="a")).requests[0].replace(steps=0),))


def test_cancelling_a_waiting_job_takes_it_out_of_the_queue(service: Service, puppet: Puppet):
    job = service.submit(Order(prompt="a"))
    assert service.cancel(job.id).state is JobState.CANCELLED
    service.received(Ready(device="cpu"))
    assert puppet.sent == []


def test_cancelling_a_running_job_asks_the_worker(service: Service, puppet: Puppet):
    service.received(Ready(device="cpu"))
    job = service.submit(Order(prompt="a"))
    assert service.cancel(job.id).state is JobState.RUNNING
    assert puppet.sent[-1] == Cancel(job_id=job.id)
    service.received(Ended(job_id=job.id, attempt=1, cancelled=True))
    assert service.cancel(job.id).state is JobState.CANCELLED


def test_a_job_whose_worker_died_comes_first_again_and_keeps_its_pictures(service: Service, puppet: Puppet):
    service.received(Ready(device="cpu"))
    first, second = service.submit(Order(prompt="a", count=2)), service.submit(Order(prompt="b"))
    service.received(finished(first, 1))
    service.lost(DIED, final=False)
    assert [service.job(job.id).position for job in (first, second)] == [0, 1]
    assert (service.status().worker, service.status().restarts) == (WorkerState.STARTING, 1)
    service.received(Ready(device="cpu"))
    assert puppet.runs()[-1] == Run(job_id=first.id, attempt=2, requests=first.requests, drawn=(1,))
    assert service.job(first.id).step == 4


def test_the_late_word_of_an_earlier_attempt_is_refused(service: Service):
    service.received(Ready(device="cpu"))
    job = service.submit(Order(prompt="a"))
    service.lost(DIED, final=False)
    service.received(finished(job, attempt=1))
    service.received(Ready(device="cpu"))
    for late in (finished(job, attempt=1), Ended(job_id=job.id, attempt=1), Stepped(job_id=job.id, attempt=1, step=3)):
        service.received(late)
    now = service.job(job.id)
    assert (now.state, now.pictures, now.step) == (JobState.RUNNING, (), 0)
    service.received(Ended(job_id="never heard of", attempt=1))


def test_a_job_that_kills_every_worker_is_given_up(service: Service):
    service.received(Ready(device="cpu"))
    job = service.submit(Order(prompt="a"))
    for _ in range(MAX_ATTEMPTS):
        service.lost(DIED, final=False)
        service.received(Ready(device="cpu"))
    now = service.job(job.id)
    assert now.state is JobState.FAILED
    assert now.error
    assert "given up after 3 attempts" in now.error.message
    assert "SIGSEGV" in now.error.message


def test_a_cancelled_job_does_not_come_back_when_its_worker_dies(service: Service):
    service.received(Ready(device="cpu"))
    job = service.submit(Order(prompt="a"))
    service.cancel(job.id)
    service.lost(DIED, final=False)
    assert service.job(job.id).state is JobState.CANCELLED


def test_a_service_that_has_failed_says_why_and_accepts_nothing(service: Service):
    job = service.submit(Order(prompt="a"))
    report = ErrorReport(code="damaged_checkpoint", message="the weights are damaged", hint="fetch them again")
    service.received(Broken(error=report))
    service.lost(report, final=True)
    assert service.status().worker is WorkerState.FAILED
    assert service.job(job.id).error == report
    with pytest.raises(ServiceUnavailable, match="the weights are damaged"):
        service.submit(Order(prompt="a"))


def test_a_failed_preparation_is_told_once():
    told = []

    def prepare(_on_stage):
        raise DoesNotFit("needs 8 GB, has 4")

    service = Service(fake_model(), Puppet())
    service.start(prepare, told.append)
    eventually(lambda: told)
    assert isinstance(told[0], DoesNotFit)
    assert service.status().error == told[0].report()


def test_a_failure_after_it_was_ready_does_not_end_the_program():
    told, puppet = [], Puppet()
    service = Service(fake_model(), puppet)
    service.start(fake_prepare, told.append)
    eventually(lambda: puppet.listener)
    service.received(Ready(device="cpu"))
    service.lost(DIED, final=True)
    assert told == []


def test_plan_and_hardware_are_known_after_preparing(service: Service):
    assert service.plan
    assert service.plan.model == "fake"
    assert service.hardware
    assert service.hardware.fingerprint == "fake"


def test_watching_shows_changes_until_the_end():
    async def watch(desk: FakeDesk, job_id: str) -> list[Job]:
        return [job async for job in desk.watch(job_id)]

    with FakeDesk(Behaviour(step_seconds=0.01)) as desk:
        jobs = asyncio.run(watch(desk, desk.submit(Order(prompt="a", steps=20)).id))
    assert jobs[-1].state is JobState.DONE
    assert len(jobs) > 3
    assert all(before.version < after.version for before, after in itertools.pairwise(jobs[1:]))


def test_watching_ends_when_the_service_stops(service: Service):
    job = service.submit(Order(prompt="a"))

    async def watch() -> list[Job]:
        return [job async for job in service.watch(job.id)]

    threading.Timer(0.1, service.stop).start()
    assert asyncio.run(watch()) == [job]
    with pytest.raises(ServiceUnavailable, match="stopping"):
        service.submit(Order(prompt="a"))


def test_a_watcher_whose_loop_has_gone_disturbs_nobody(service: Service):
    job = service.submit(Order(prompt="a"))

    async def look_once() -> Job:
        return await anext(service.watch(job.id))

    asyncio.run(look_once())
    service.received(Ready(device="cpu"))
    assert service.job(job.id).state is JobState.RUNNING


def test_orders_from_many_threads_all_run():
    with FakeDesk() as desk:
        ids: list[str] = []
        threads = [
            threading.Thread(target=lambda: ids.extend(desk.submit(Order(prompt="a")).id for _ in range(20)))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {desk.wait(job_id).state for job_id in ids} == {JobState.DONE}
        assert len(set(ids)) == desk.status().done == 160


def test_the_store_drops_the_oldest_finished_jobs_and_keeps_the_others():
    store = MemoryStore(max_finished=2, max_picture_bytes=100)
    jobs = [Job(id=str(i), requests=(), created_at=0.0, state=JobState.DONE) for i in range(4)]
    store.put(Job(id="waiting", requests=(), created_at=0.0))
    for job in jobs:
        store.put(job)
    assert [job.id for job in store.list()] == ["waiting", "2", "3"]
    store.put_picture("2", 0, b"x" * 60)
    store.put_picture("3", 0, b"x" * 60)
    assert [job.id for job in store.list()] == ["waiting", "3"]
    assert store.picture("2", 0) is None
    assert store.picture("3", 0) == b"x" * 60


def test_fakes_draw_the_same_for_the_same_request_only():
    with FakeDesk() as desk:
        first, second = desk.submit(Order(prompt="a", seed=1, count=2)).requests
    assert draw(first).tobytes() == draw(first).tobytes()
    assert draw(first).tobytes() != draw(second).tobytes()


def test_a_loading_worker_is_told_what_comes_first(service, puppet):
    first = service.submit(Order(prompt="a", count=2))
    assert puppet.sent == [], "nothing loads yet"
    puppet.listener.received(Loading(stage="starting", progress=0.0))
    assert puppet.sent == [Coming(prompts=("a", "a"))]
    service.submit(Order(prompt="b"))
    assert puppet.sent[1:] == [Coming(prompts=("a", "a"))], "still the first"
    puppet.listener.received(Loading(stage="loading", progress=0.5))
    assert len(puppet.sent) == 2
    puppet.listener.received(Ready(device="cpu"))
    assert [run.job_id for run in puppet.runs()] == [first.id]
    service.submit(Order(prompt="c"))
    assert not [message for message in puppet.sent[2:] if isinstance(message, Coming)]


def test_a_worker_that_starts_again_is_told_what_it_lost(service, puppet):
    puppet.listener.received(Ready(device="cpu"))
    service.submit(Order(prompt="a"))
    puppet.listener.lost(DIED, final=False)
    puppet.listener.received(Loading(stage="starting", progress=0.0))
    assert puppet.sent[-1] == Coming(prompts=("a",))


def test_what_waits_before_the_worker_starts_is_told_with_the_plan(puppet):
    service = Service(fake_model(), puppet)
    service.submit(Order(prompt="a"))
    service.submit(Order(prompt="b"))
    service.start(fake_prepare)
    eventually(lambda: puppet.listener)
    assert puppet.load.coming == ("a",)
    assert puppet.sent == []
