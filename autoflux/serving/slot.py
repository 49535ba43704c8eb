"""A place in the application for a frontend that is still being built."""

from __future__ import annotations

import asyncio
import contextlib
import html
import threading
from collections.abc import Callable

import msgspec
from asgi_lifespan import LifespanManager, LifespanNotSupported
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from autoflux.errors import AutofluxError, ErrorReport, PluginFailure
from autoflux.serving.frontend import AsgiApp, Desk, Frontend, Receive, Scope, Send

STARTUP_SECONDS = 120.0
"""How long a frontend's own startup may take; gradio's takes under a second."""

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="refresh" content="1">
<title>autoflux is starting</title>
<style>
  :root { color-scheme: light dark; --page: #f6f7f9; --text: #20242c; --quiet: #626a78; --track: #dfe3e9 }
  @media (prefers-color-scheme: dark) {
    :root { --page: #14161a; --text: #e6e8ec; --quiet: #98a0ae; --track: #2a2e36 }
  }
  body { min-height: 100vh; margin: 0; display: grid; place-content: center; justify-items: center; gap: .7rem;
         font: 16px/1.5 system-ui, sans-serif; text-align: center; background: var(--page); color: var(--text) }
  h1 { margin: 0; font-size: 1.4rem; font-weight: 600 }
  p { margin: 0; color: var(--quiet) }
  div { width: 12rem; height: 3px; border-radius: 2px; overflow: hidden; background: var(--track) }
  div::after { content: ""; display: block; width: 40%; height: 100%; background: #3d7bd9;
               animation: slide 1s ease-in-out infinite alternate }
  @keyframes slide { to { transform: translateX(150%) } }
  @media (prefers-reduced-motion: reduce) { div::after { animation: none } }
</style>
<h1>autoflux is starting</h1>
<div></div>
<p>{status}</p>
</html>
"""


class Slot:
    """An ASGI application that says "starting" until `open` has built the frontend."""

    def __init__(self, frontend: Frontend, desk: Desk) -> None:
        self.name = frontend.name
        self._frontend = frontend
        self._desk = desk
        self._app: AsgiApp | None = None

    async def run(self, closing: asyncio.Event) -> None:
        """Build the frontend in a thread, run its lifespan, and keep it until `closing`.

        Raises:
            PluginFailure: it could not be built or started.
        """
        async with contextlib.AsyncExitStack() as stack:
            try:
                app = await _in_thread(self._frontend.build, self._desk)
                with contextlib.suppress(LifespanNotSupported):
                    await stack.enter_async_context(
                        LifespanManager(app, startup_timeout=STARTUP_SECONDS, shutdown_timeout=1.0)
                    )
            except AutofluxError:
                raise
            except Exception as error:
                message = f"the frontend {self.name!r} could not be started: {type(error).__name__}: {error}"
                raise PluginFailure(message) from error
            self._app = app
            await closing.wait()
            self._app = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._app is not None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1013, "reason": "starting"})
        else:
            await self._waiting(Request(scope))(scope, receive, send)

    def _waiting(self, request: Request) -> Response:
        headers = {"retry-after": "1", "cache-control": "no-store"}
        if "text/html" not in request.headers.get("accept", ""):
            report = ErrorReport(code="starting", message=f"the frontend {self.name!r} is starting", hint="try again")
            body = msgspec.json.encode({"error": report})
            return Response(body, status_code=503, headers=headers, media_type="application/json")
        status = self._desk.status()
        line = f"{status.model} · {status.stage or status.worker.value}"
        return HTMLResponse(_PAGE.replace("{status}", html.escape(line)), status_code=503, headers=headers)


async def _in_thread(build: Callable[[Desk], AsgiApp], desk: Desk) -> AsgiApp:
    """Like `asyncio.to_thread`, but the program may end while the thread is still importing."""
    loop = asyncio.get_running_loop()
    built: asyncio.Future[AsgiApp] = loop.create_future()

    def settle(app: AsgiApp | None, error: Exception | None) -> None:
        if built.cancelled():
            return
        if error is not None:
            built.set_exception(error)
        elif app is not None:
            built.set_result(app)

    def run() -> None:
        app, failure = None, None
        try:
            app = build(desk)
        except Exception as error:  # noqa: BLE001 — told to the coroutine that waits
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile
            loop.call_soon_threadsafe(settle, app, failure)

    threading.Thread(target=run, name="autoflux-build", daemon=True).start()
    return await built
