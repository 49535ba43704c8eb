"""What the service and its worker process say to each other: tagged MessagePack, no pickle between processes."""

from __future__ import annotations

import msgspec

from autoflux.errors import ErrorReport
from autoflux.models.request import Request
from autoflux.models.values import Model
from autoflux.planning.fitting import Measured
from autoflux.planning.values import Plan


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Base of both directions."""


class Load(Message, frozen=True, kw_only=True):
    """Service → worker, first of all: build the pipeline of this plan with the backend it names."""

    plan: Plan
    model: Model
    warm_up: bool = True
    """Draw one step of a picture before saying Ready, so that the first user does not wait for it."""
    coming: tuple[str, ...] = ()
    """Prompts that wait to be drawn first; `Coming` tells of those that come later."""


class Coming(Message, frozen=True, kw_only=True):
    """Service → worker, while it loads: these prompts wait to be drawn first. They come as jobs later."""

    prompts: tuple[str, ...]


class Run(Message, frozen=True, kw_only=True):
    """Service → worker: draw these, in order, without those that an earlier attempt has `drawn` already."""

    job_id: str
    attempt: int
    requests: tuple[Request, ...]
    drawn: tuple[int, ...] = ()
    measured: bool = False
    """Say what each batch took."""
    afresh: bool = False
    """Encode prompts even if they are remembered."""


class Cancel(Message, frozen=True, kw_only=True):
    """Service → worker: stop that job between two steps, or forget it when it has not begun."""

    job_id: str


class Stop(Message, frozen=True, kw_only=True):
    """Service → worker: end the process now, whatever it is doing; its memory goes with it."""


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
    """Nothing to do, still here. Said by the thread that draws, so a hanging one is silent."""


class Started(Message, frozen=True, kw_only=True):
    job_id: str
    attempt: int


class Stepped(Message, frozen=True, kw_only=True):
    """Denoise steps done so far, counted over all pictures of the job."""

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


class Took(Message, frozen=True, kw_only=True):
    """What a batch of the job's pictures took, if that was asked for; said before they are finished."""

    job_id: str
    attempt: int
    measured: Measured


class Ended(Message, frozen=True, kw_only=True):
    """The job is over: done, cancelled, or failed with `error`."""

    job_id: str
    attempt: int
    cancelled: bool = False
    error: ErrorReport | None = None
    peak_vram_bytes: int = 0
    """What torch has taken of the device since the process began, without the driver's context."""
    peak_ram_bytes: int = 0
    """Of the process since it began; 0 where the system does not tell."""


ToWorker = Load | Coming | Run | Cancel | Stop
FromWorker = Loading | Ready | Broken | Alive | Started | Stepped | Took | Finished | Ended
AboutJob = Started | Stepped | Took | Finished | Ended
