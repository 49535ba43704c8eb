"""The desk: accepts orders at any time, gives them to the worker one after the other, and keeps what comes out."""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable

from autoflux.errors import AutofluxError, ErrorReport, NotKept, OutOfMemory, QueueFull, ServiceUnavailable, describe
from autoflux.hardware.values import Hardware
from autoflux.models.request import Order, Request, check, make_requests
from autoflux.models.values import Model
from autoflux.planning.values import Plan
from autoflux.serving.adapting import Adaptation, Decision, Planner
from autoflux.serving.frontend import Desk
from autoflux.serving.jobs import Job, JobState, JobStore, Status, WorkerState
from autoflux.serving.messages import (
    Broken,
    Cancel,
    Coming,
    Ended,
    Finished,
    FromWorker,
    Load,
    Loading,
    Ready,
    Run,
    Started,
    Stepped,
    Took,
)
from autoflux.serving.preparation import Prepare, Prepared, revive
from autoflux.serving.store import MemoryStore
from autoflux.serving.supervisor import Listener, Supervisor, Worker
from autoflux.serving.watchers import Watchers

MAX_ATTEMPTS = 3
"""Workers a job is given to. One that kills three of them is to blame itself."""


class Service(Desk, Listener):
    """A queue before one worker. All methods may be called from any thread.

    Jobs run first come, first served. A job whose worker dies goes back to the head of the queue with the pictures it
    has, and what the dead worker may still have said of it is refused by its attempt number.
    """

    def __init__(
        self,
        model: Model,
        worker: Worker | None = None,
        store: JobStore | None = None,
        *,
        planner: Planner | None = None,
        warm_up: bool = True,
        max_queued: int = 1000,
        clock: Callable[[], float] = time.time,
        on_status: Callable[[Status], None] | None = None,
    ) -> None:
        """`on_status` hears of every change of the worker's state and stage; it must be quick.

        With a `planner` the first pictures are compared with the plan, which may be changed for a better one.
        """
        self.model = model
        self._worker = worker or Supervisor()
        self._store = store or MemoryStore()
        self._warm_up = warm_up
        self._max_queued = max_queued
        self._clock = clock
        self._on_status = on_status
        self._lock = threading.RLock()
        self._queue: deque[str] = deque()
        self._running: str | None = None
        self._cancelling = False
        self._watchers = Watchers()
        self._status = Status(worker=WorkerState.STARTING, stage="starting", model=model.name)
        self._hardware: Hardware | None = None
        self._plan: Plan | None = None
        self._prepared: Prepared | None = None
        self._adaptation = Adaptation(model, planner, self._decided)
        self._next: Plan | None = None
        self._was_ready = False
        self._on_failed: Callable[[AutofluxError], None] | None = None

    # Starting and stopping

    def start(self, prepare: Prepare, on_failed: Callable[[AutofluxError], None] | None = None) -> None:
        """Prepare and start the worker, in the background. `on_failed` hears of a failure before it was ever ready."""
        self._on_failed = on_failed
        threading.Thread(target=self._prepare, args=(prepare,), name="autoflux-prepare", daemon=True).start()

    def stop(self) -> None:
        """End the worker and everyone's waiting. Accepts no more jobs."""
        with self._lock:
            self._set_status(worker=WorkerState.STOPPED, stage="")
        self._watchers.wake_all()
        self._worker.stop()

    def _prepare(self, prepare: Prepare) -> None:
        try:
            prepared = prepare(self._show_stage)
        except Exception as error:  # noqa: BLE001 — whatever goes wrong is shown in the status
            self._fail(error if isinstance(error, AutofluxError) else revive(describe(error)))
            return
        with self._lock:
            self._prepared, self._hardware, self._plan = prepared, prepared.hardware, prepared.plan
            self._adaptation.follow(prepared.hardware, prepared.plan)
            if self._status.worker.accepting:
                load = Load(
                    plan=prepared.plan, model=prepared.model, warm_up=self._warm_up, coming=self._first_prompts()
                )
                self._worker.start(load, self)

    def _show_stage(self, stage: str) -> None:
        with self._lock:
            if self._status.worker is WorkerState.STARTING:
                self._set_status(stage=stage)

    # What frontends use

    @property
    def hardware(self) -> Hardware | None:
        return self._hardware

    @property
    def plan(self) -> Plan | None:
        return self._plan

    def submit(self, order: Order) -> Job:
        return self.submit_requests(make_requests(self.model, order))

    def submit_requests(self, requests: tuple[Request, ...]) -> Job:
        for request in requests:
            check(request, self.model.limits)
        with self._lock:
            self._check_accepting()
            job = Job(id=secrets.token_hex(8), requests=requests, created_at=self._clock())
            self._store.put(job)
            self._queue.append(job.id)
            self._announce()
            self._dispatch()
            return self.job(job.id)

    def job(self, job_id: str) -> Job:
        with self._lock:
            return self._placed(self._stored(job_id))

    def jobs(self) -> list[Job]:
        with self._lock:
            return [self._placed(job) for job in self._store.list()]

    async def watch(self, job_id: str) -> AsyncIterator[Job]:
        with self._watchers.waiting_for(job_id) as changed:
            seen = None
            while True:
                changed.clear()
                job = self.job(job_id)
                if job != seen:
                    yield job
                    seen = job
                if job.state.finished or self._status.worker is WorkerState.STOPPED:
                    return
                await changed.wait()

    def cancel(self, job_id: str) -> Job:
        with self._lock:
            job = self.job(job_id)
            if job.state is JobState.QUEUED:
                self._queue.remove(job_id)
                self._finish(job, JobState.CANCELLED)
                self._watchers.wake_all()
            elif job.state is JobState.RUNNING:
                self._cancelling = True
                self._worker.send(Cancel(job_id=job_id))
            return self.job(job_id)

    def picture(self, job_id: str, index: int) -> bytes:
        self.job(job_id)
        png = self._store.picture(job_id, index)
        if png is None:
            raise NotKept(f"job {job_id!r} has no picture {index}", hint="it has those that it lists")
        return png

    def status(self) -> Status:
        with self._lock:
            return self._status.replace(queued=len(self._queue), running=0 if self._running is None else 1)

    # What the worker tells

    def received(self, message: FromWorker) -> None:
        with self._lock:
            match message:
                case Loading():
                    began = self._status.worker is not WorkerState.LOADING
                    self._set_status(worker=WorkerState.LOADING, stage=message.stage, progress=message.progress)
                    if began:
                        self._announce()
                case Ready():
                    self._was_ready = True
                    self._set_status(
                        worker=WorkerState.READY, stage="", progress=1.0, error=None, device=message.device
                    )
                    self._dispatch()
                case Broken():
                    self._set_status(error=message.error)
                case Started() | Stepped() | Took() | Finished() | Ended():
                    self._update(message)
                case _:
                    pass

    def lost(self, reason: ErrorReport, *, final: bool) -> None:
        with self._lock:
            self._requeue(reason)
            if final:
                self._fail(revive(reason))
            elif decision := self._adaptation.gave_up(reason):
                self._set_status(note=decision.note)
                self._change(decision.plan)
            else:
                self._set_status(
                    worker=WorkerState.STARTING,
                    stage="starting again",
                    progress=0.0,
                    error=reason,
                    restarts=self._status.restarts + 1,
                )

    # Inside; the lock is held

    def _check_accepting(self) -> None:
        if self._status.worker is WorkerState.STOPPED:
            raise ServiceUnavailable("the service is stopping")
        if self._status.worker is WorkerState.FAILED:
            error = self._status.error
            raise ServiceUnavailable(
                f"the service has failed: {error.message if error else 'for an unknown reason'}",
                hint=error.hint if error else None,
            )
        if len(self._queue) >= self._max_queued:
            raise QueueFull(f"{len(self._queue):,} jobs are waiting already", hint="try again later")

    def _announce(self) -> None:
        """Tell a worker that loads what it will be given first, so that it loads that first."""
        if self._queue and self._status.worker is WorkerState.LOADING:
            self._worker.send(Coming(prompts=self._first_prompts()))

    def _first_prompts(self) -> tuple[str, ...]:
        """Those of the job that waits at the head of the queue."""
        requests = self._stored(self._queue[0]).requests if self._queue else ()
        return tuple(request.prompt for request in requests)

    def _dispatch(self) -> None:
        """Give the worker the next job if it has none; or the next plan, if there is one."""
        idle = self._running is None and self._status.worker is WorkerState.READY
        if idle and self._next is not None:
            self._change(self._next)
        elif idle and self._queue:
            job = self._stored(self._queue.popleft()).started(self._clock())
            self._running, self._cancelling = job.id, False
            self._keep(job)
            drawn = tuple(picture.index for picture in job.pictures)
            measured = self._adaptation.measuring
            self._worker.send(
                Run(job_id=job.id, attempt=job.attempt, requests=job.requests, drawn=drawn, measured=measured)
            )
        self._watchers.wake_all()

    def _decided(self, decision: Decision) -> None:
        """What came of comparing the plan with its first pictures. Called from a thread of its own."""
        with self._lock:
            self._set_status(note=decision.note)
            self._next = decision.plan
            self._dispatch()

    def _change(self, plan: Plan | None) -> None:
        """Run another plan from now on, between two jobs."""
        self._next = None
        if plan is None or self._prepared is None or not self._status.worker.accepting:
            return
        self._plan = plan
        self._adaptation.changed()
        self._set_status(worker=WorkerState.LOADING, stage="changing plans", progress=0.0)
        self._worker.switch(Load(plan=plan, model=self._prepared.model, warm_up=self._warm_up))

    def _update(self, message: Started | Stepped | Took | Finished | Ended) -> None:
        job = self._store.get(message.job_id)
        if job is None or message.job_id != self._running or message.attempt != job.attempt:
            return  # the late word of an earlier attempt
        match message:
            case Stepped():
                self._keep(job.changed(step=message.step))
            case Took():
                self._adaptation.took(message.measured)
            case Finished():
                self._store.put_picture(job.id, message.index, message.png)
                self._keep(job.with_picture(message.index, message.seconds, message.warnings))
            case Ended() if message.error and (decision := self._does_not_fit(message.error)):
                self._requeue(message.error)
                self._set_status(note=decision.note)
                self._change(decision.plan)
            case Ended():
                self._running = None
                state = JobState.FAILED if message.error else JobState.DONE
                self._finish(job, JobState.CANCELLED if message.cancelled else state, message.error)
                self._dispatch()
            case _:
                pass

    def _does_not_fit(self, error: ErrorReport) -> Decision | None:
        """The decision to go back, if a plan on trial lacks the memory that it was predicted to need."""
        return self._adaptation.gave_up(error) if error.code == OutOfMemory.code else None

    def _requeue(self, reason: ErrorReport) -> None:
        """The worker is gone: its job goes back to the head of the queue, unless it is to blame or not wanted."""
        if self._running is None:
            return
        job = self._stored(self._running)
        self._running = None
        if self._cancelling:
            self._finish(job, JobState.CANCELLED)
        elif job.attempt >= MAX_ATTEMPTS:
            message = f"given up after {job.attempt} attempts; the last time, {reason.message}"
            self._finish(job, JobState.FAILED, ErrorReport(code=reason.code, message=message, hint=reason.hint))
        else:
            self._queue.appendleft(job.id)
            self._keep(job.changed(state=JobState.QUEUED))

    def _fail(self, error: AutofluxError) -> None:
        with self._lock:
            self._set_status(worker=WorkerState.FAILED, stage="", error=error.report())
            while self._queue:
                self._finish(self._stored(self._queue.popleft()), JobState.FAILED, error.report())
        if self._on_failed and not self._was_ready:
            self._on_failed(error)

    def _finish(self, job: Job, state: JobState, error: ErrorReport | None = None) -> None:
        self._status = self._status.replace(done=self._status.done + 1)
        self._keep(job.changed(state=state, finished_at=self._clock(), error=error))

    def _keep(self, job: Job) -> None:
        self._store.put(job)
        self._watchers.wake(job.id)

    def _stored(self, job_id: str) -> Job:
        job = self._store.get(job_id)
        if job is None:
            raise NotKept(f"there is no job {job_id!r}", hint="finished jobs are kept for a while only")
        return job

    def _placed(self, job: Job) -> Job:
        """The job with its place in the queue."""
        if job.state is not JobState.QUEUED:
            return job
        ahead = 0 if self._running is None else 1
        return job.replace(position=self._queue.index(job.id) + ahead)

    def _set_status(self, **changes: object) -> None:
        if self._status.worker is not WorkerState.STOPPED:
            self._status = self._status.replace(**changes)
            if self._on_status:
                self._on_status(self._status)
