"""What the service and its worker process say to each other: tagged MessagePack, no pickle between processes."""

from __future__ import annotations

import msgspec

from autoflux.errors import ErrorReport
from autoflux.models.request import Request


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Base of both directions."""


class Run(Message, frozen=True, kw_only=True):
    """Service → worker: draw these, in order."""

    job_id: str
    attempt: int
    requests: tuple[Request, ...]


class Cancel(Message, frozen=True, kw_only=True):
    """Service → worker: stop that job between two steps, or forget it when it has not begun."""

    job_id: str


class Stop(Message, frozen=True, kw_only=True):
    """Service → worker: finish the current step and end the process."""


class Loading(Message, frozen=True, kw_only=True):
    stage: str
    progress: float


class Ready(Message, frozen=True, kw_only=True):
    """The pipeline is built; jobs run from now on."""

    device: str


class Broken(Message, frozen=True, kw_only=True):
    """The pipeline could not be built; the worker ends."""

    error: ErrorReport


class Alive(Message, frozen=True, kw_only=True):
    """Nothing to report, still here."""


class Started(Message, frozen=True, kw_only=True):
    job_id: str
    attempt: int


class Stepped(Message, frozen=True, kw_only=True):
    """One more denoise step done, counted over all pictures of the job."""

    job_id: str
    attempt: int
    step: int


class Finished(Message, frozen=True, kw_only=True):
    """A picture is drawn; `png` is the whole file, metadata included."""

    job_id: str
    attempt: int
    index: int
    png: bytes
    seconds: float
    warnings: tuple[str, ...] = ()


class Ended(Message, frozen=True, kw_only=True):
    """The job is over: done, cancelled, or failed with `error`."""

    job_id: str
    attempt: int
    cancelled: bool = False
    error: ErrorReport | None = None


ToWorker = Run | Cancel | Stop
FromWorker = Loading | Ready | Broken | Alive | Started | Stepped | Finished | Ended
