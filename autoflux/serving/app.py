"""The HTTP application: health, the API, and the frontends, behind the guard. Imports no torch."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Sequence

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route

from autoflux.errors import AutofluxError, ErrorReport, PluginFailure
from autoflux.serving.frontend import AsgiApp, Desk, Frontend, Receive, Scope, Send
from autoflux.serving.guard import Guard
from autoflux.serving.slot import Slot

RESERVED = ("api", "health")
"""Paths that no frontend gets."""


def make_app(
    desk: Desk,
    api: Frontend,
    frontends: Sequence[Frontend] = (),
    *,
    bound_host: str = "127.0.0.1",
    allowed_hosts: Iterable[str] = (),
    on_failed: Callable[[AutofluxError], None] | None = None,
) -> AsgiApp:
    """The application of a service: `api` at `/api`, the first frontend at `/`, the others at their names.

    Frontends are built in threads after startup, because importing them takes seconds; until then their pages say so.
    `on_failed` hears of one that cannot be started.

    Raises:
        PluginFailure: a frontend's name cannot be a path.
    """
    check_names(frontends)
    slots = [Slot(frontend, desk) for frontend in frontends]

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        closing = asyncio.Event()
        tasks = [asyncio.create_task(_keep(slot, closing, on_failed)) for slot in slots]
        yield
        closing.set()
        if tasks:
            await asyncio.wait(tasks, timeout=2.0)  # a thread that still imports is let go

    root = api.build(desk)
    routes: list[BaseRoute] = [Route("/health", _health(desk)), Route("/api", _AtFolder(root)), Mount("/api", root)]
    for slot in slots[1:]:
        routes += [Route(f"/{slot.name}", _to_folder), Mount(f"/{slot.name}", slot)]
    routes.append(Mount("/", slots[0]) if slots else Route("/", _no_page))
    return Guard(Starlette(routes=routes, lifespan=lifespan), bound_host, allowed_hosts)


async def _keep(slot: Slot, closing: asyncio.Event, on_failed: Callable[[AutofluxError], None] | None) -> None:
    try:
        await slot.run(closing)
    except AutofluxError as error:
        if on_failed:
            on_failed(error)


def check_names(frontends: Sequence[Frontend]) -> None:
    """Raise PluginFailure for a name that cannot be a path of the application."""
    for frontend in frontends:
        if frontend.name in RESERVED or not frontend.name.replace("-", "").replace("_", "").isalnum():
            raise PluginFailure(f"a frontend cannot be named {frontend.name!r}: its name is a path of the server")


def _health(desk: Desk) -> Callable[[Request], Response]:
    def health(_request: Request) -> Response:
        status = desk.status()
        body = msgspec.json.encode({"state": status.worker, "stage": status.stage, "error": status.error})
        code = 200 if status.worker.accepting else 503
        return Response(body, status_code=code, media_type="application/json")

    return health


class _AtFolder:
    """An application that is mounted at a folder, as it answers to the folder's name without the slash.

    No redirect, as pages get: programs seldom follow one.
    """

    def __init__(self, app: AsgiApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        await self._app({**scope, "root_path": path, "path": f"{path}/"}, receive, send)


def _to_folder(request: Request) -> Response:
    return RedirectResponse(request.url.path + "/")


def _no_page(_request: Request) -> Response:
    report = ErrorReport(code="no_page", message="this server has no page", hint="the API is at /api/status")
    return Response(msgspec.json.encode({"error": report}), status_code=404, media_type="application/json")
