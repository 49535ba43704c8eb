"""What a frontend plugin is, and what it gets to work with."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any, ClassVar, Protocol

from autoflux.hardware.values import Hardware
from autoflux.models.request import Order, Request
from autoflux.models.values import Model
from autoflux.planning.values import Plan
from autoflux.serving.jobs import Job, Status

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]


class Desk(Protocol):
    """The service as a frontend sees it: order pictures, watch them come, fetch them. Safe from any thread."""

    model: Model

    @property
    def hardware(self) -> Hardware | None:
        """The machine; None until it has been probed."""

    @property
    def plan(self) -> Plan | None:
        """How the model runs on it; None until that has been planned."""

    def submit(self, order: Order) -> Job:
        """Accept an order; it is queued when this returns, also while the model is still loading.

        Raises:
            InvalidRequest: a field is out of the model's limits.
            QueueFull: too many jobs wait already.
            ServiceUnavailable: the worker cannot be started, or the service is stopping.
        """

    def submit_requests(self, requests: tuple[Request, ...]) -> Job:
        """The same for requests that are complete already."""

    def job(self, job_id: str) -> Job:
        """The job as it is now. Raises UnknownName when there is none of that id."""

    def jobs(self) -> list[Job]:
        """All jobs kept, oldest first."""

    def watch(self, job_id: str) -> AsyncIterator[Job]:
        """The job now and after every change, until it is finished; changes in quick succession may be merged.

        Must be used in a coroutine. Ends early when the service stops.
        """

    def cancel(self, job_id: str) -> Job:
        """Stop a queued or running job between two steps; a finished one is left as it is."""

    def picture(self, job_id: str, index: int) -> bytes:
        """A drawn picture as PNG with its metadata. Raises UnknownName when there is none."""

    def status(self) -> Status:
        """How the service is."""


class Frontend(Protocol):
    """A way to use the service. `build` returns any ASGI application; the server mounts it behind its guard.

    Registered by a plugin::

        class HelloFrontend:
            name = "hello"
            description = "says hello"
            def missing(self):
                return None
            def build(self, desk):
                return Starlette(routes=[Route("/", lambda request: PlainTextResponse("hello"))])

        @autoflux.hookimpl
        def register_frontends(register):
            register(HelloFrontend())
    """

    name: ClassVar[str]
    description: ClassVar[str]

    def missing(self) -> str | None:
        """The pip command that would make this frontend work here, None when it works. Must be quick."""

    def build(self, desk: Desk) -> AsgiApp:
        """The application for the path `/`. Called in a thread after the port is open, so it may import for seconds."""
