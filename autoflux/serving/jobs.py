"""Jobs: what a client ordered, how far it is, and what came out. Values and the store they are kept in."""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol

from autoflux.errors import ErrorReport
from autoflux.models.request import Request
from autoflux.values import Value


class JobState(StrEnum):
    """A job goes queued → running → one of the other three; back to queued when its worker died."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def finished(self) -> bool:
        return self in (JobState.DONE, JobState.FAILED, JobState.CANCELLED)


class Drawn(Value, frozen=True, kw_only=True):
    """A finished picture of a job; its PNG is fetched from the store by job and index."""

    index: int
    seed: int
    width: int
    height: int
    seconds: float
    warnings: tuple[str, ...] = ()


class Job(Value, frozen=True, kw_only=True):
    """One order of one or more pictures. Every change makes a new Job with `version` one higher.

    `attempt` counts the workers that were given it: a late result of an earlier attempt is refused.
    `step` and `steps` count over all pictures of the job.
    """

    id: str
    requests: tuple[Request, ...]
    state: JobState = JobState.QUEUED
    created_at: float
    started_at: float | None = None
    finished_at: float | None = None
    attempt: int = 0
    version: int = 0
    step: int = 0
    pictures: tuple[Drawn, ...] = ()
    error: ErrorReport | None = None
    position: int | None = None
    """While it is queued: jobs before it, waiting or being drawn."""

    @property
    def steps(self) -> int:
        return sum(request.steps for request in self.requests)

    def changed(self, **changes: object) -> Job:
        """The next version."""
        return self.replace(version=self.version + 1, position=None, **changes)

    def started(self, now: float) -> Job:
        """Given to a worker, once more. Pictures of earlier attempts count as done."""
        step = sum(self.requests[drawn.index].steps for drawn in self.pictures)
        return self.changed(state=JobState.RUNNING, attempt=self.attempt + 1, started_at=now, step=step)

    def with_picture(self, index: int, seconds: float, warnings: tuple[str, ...] = ()) -> Job:
        """With one more of its pictures drawn."""
        request = self.requests[index]
        drawn = Drawn(
            index=index,
            seed=request.seed,
            width=request.width,
            height=request.height,
            seconds=seconds,
            warnings=warnings,
        )
        return self.changed(pictures=(*self.pictures, drawn))


class JobStore(Protocol):
    """Where jobs and pictures are kept. `put` returns after the job is as safe as the store can make it."""

    def put(self, job: Job) -> None:
        """Add a job or replace the one with its id."""

    def get(self, job_id: str) -> Job | None: ...

    def list(self) -> list[Job]:
        """All jobs kept, oldest first."""

    def put_picture(self, job_id: str, index: int, png: bytes) -> None: ...

    def picture(self, job_id: str, index: int) -> bytes | None: ...


class WorkerState(StrEnum):
    """What the worker process is doing, as the status line of every frontend shows it."""

    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    STOPPED = "stopped"

    @property
    def accepting(self) -> bool:
        """Whether jobs can be ordered."""
        return self not in (WorkerState.FAILED, WorkerState.STOPPED)


class Status(Value, frozen=True, kw_only=True):
    """How the service is: jobs are accepted in every state but `failed` and `stopped`."""

    worker: WorkerState
    stage: str = ""
    """What is being done while starting or loading, for people."""
    progress: float = 0.0
    error: ErrorReport | None = None
    queued: int = 0
    running: int = 0
    done: int = 0
    restarts: int = 0
    model: str = ""
    device: str = ""
    note: str = ""
    """What was last found out about the plan while it ran, for people."""
