"""The routes of the frontend `api`. Bodies and answers are the JSON of autoflux's own values, read strictly."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from autoflux import AutofluxError, Desk, InvalidRequest, Job, Order, describe

MAX_BODY_BYTES = 1024 * 1024

KEEP_ALIVE_SECONDS = 15.0
"""Proxies cut streams that are silent, many after a minute."""

EXAMPLE = """send JSON such as {"prompt": "a red circle"}"""

WHOLE_ESCAPE = re.compile(rb"\\\\|\\u[dD][89abAB]..\\u[dD][c-fC-F]..", re.DOTALL)
"""A backslash that stands for itself, and a surrogate pair: what is no lone surrogate."""

LONE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]..", re.DOTALL)

STATUS_CODES = {
    "invalid_request": 400,
    "usage": 400,
    "does_not_fit": 400,
    "unknown_name": 404,
    "not_kept": 404,
    "queue_full": 429,
    "service_unavailable": 503,
}


def make_api(desk: Desk) -> Starlette:
    """The application for the path `/api`."""
    api = _Api(desk)
    routes = [
        Route("/jobs", api.submit, methods=["POST"]),
        Route("/jobs", api.jobs),
        Route("/jobs/{job_id}", api.job),
        Route("/jobs/{job_id}", api.cancel, methods=["DELETE"]),
        Route("/jobs/{job_id}/events", api.events),
        Route("/jobs/{job_id}/pictures/{index:int}.png", api.picture),
        Route("/status", api.status),
        Route("/plan", api.plan),
        Route("/hardware", api.hardware),
    ]
    handlers: dict[Any, Any] = {AutofluxError: _on_error, HTTPException: _on_http_error, Exception: _on_error}
    return Starlette(routes=routes, exception_handlers=handlers)


class _Api:
    """One method a route. Those that are not coroutines run in threads."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def submit(self, request: Request) -> Response:
        order = _read_order(await _read_body(request))
        job = await run_in_threadpool(self._desk.submit, order)
        return _json(_job_data(job, request), 201, {"location": f"{_root(request)}/jobs/{job.id}"})

    def jobs(self, request: Request) -> Response:
        return _json([_job_data(job, request) for job in self._desk.jobs()])

    def job(self, request: Request) -> Response:
        return _json(_job_data(self._desk.job(_job_id(request)), request))

    def cancel(self, request: Request) -> Response:
        return _json(_job_data(self._desk.cancel(_job_id(request)), request))

    async def events(self, request: Request) -> Response:
        job = self._desk.job(_job_id(request))  # an unknown one is refused before the stream begins
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(self._stream(job.id, request), media_type="text/event-stream", headers=headers)

    def picture(self, request: Request) -> Response:
        png = self._desk.picture(_job_id(request), request.path_params["index"])
        headers = {"cache-control": "private, max-age=31536000, immutable"}  # a finished picture never changes
        return Response(png, media_type="image/png", headers=headers)

    def status(self, _request: Request) -> Response:
        return _json(self._desk.status())

    def plan(self, _request: Request) -> Response:
        return _known("plan", self._desk.plan)

    def hardware(self, _request: Request) -> Response:
        return _known("hardware", self._desk.hardware)

    async def _stream(self, job_id: str, request: Request) -> AsyncIterator[bytes]:
        """A `job` event for every change, then an `end` event: a stream without one was cut."""
        job = None
        async with aclosing(_with_pauses(self._desk.watch(job_id))) as changes:
            async for change in changes:
                job = change or job
                yield _event("job", _job_data(change, request)) if change else b": still here\n\n"
        if job and job.state.finished:
            yield _event("end", {"state": job.state})


async def _with_pauses(changes: AsyncIterator[Job]) -> AsyncGenerator[Job | None, None]:
    """The same, with None whenever nothing came for a while."""
    coming = asyncio.ensure_future(anext(changes, None))
    try:
        while True:
            await asyncio.wait([coming], timeout=KEEP_ALIVE_SECONDS)
            if not coming.done():
                yield None
                continue
            change = coming.result()
            if change is None:
                return
            yield change
            coming = asyncio.ensure_future(anext(changes, None))
    finally:
        coming.cancel()


async def _read_body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"the body is larger than {MAX_BODY_BYTES:,} bytes")
    return bytes(body)


def _read_order(body: bytes) -> Order:
    if not body.strip():
        raise InvalidRequest("the body is empty", hint=EXAMPLE)
    try:
        return msgspec.json.decode(body.decode(), type=Order)
    except UnicodeDecodeError as error:
        raise InvalidRequest("the body is not valid UTF-8 text", hint=EXAMPLE) from error
    except msgspec.ValidationError as error:
        named = re.search(r"\$\.(\w+)|field `(\w+)`", str(error))
        param = (named[1] or named[2]) if named else None
        known = ", ".join(Order.__struct_fields__)
        raise InvalidRequest(f"not a valid order: {error}", hint=f"the fields are {known}", param=param) from error
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON text: {_flaw(body, error)}", hint=EXAMPLE) from error


def _flaw(body: bytes, error: Exception) -> str:
    """What is wrong with the JSON. msgspec calls the text cut off when half of a surrogate pair ends a string."""
    if LONE_SURROGATE.search(WHOLE_ESCAPE.sub(b" ", body)):
        return "a string has a lone surrogate"
    return str(error).removeprefix("JSON is malformed: ").removeprefix("Input data was ")


def _job_data(job: Job, request: Request) -> dict[str, object]:
    """The job's JSON with what is worked out: the steps in all, and where each picture is."""
    base = f"{_root(request)}/jobs/{job.id}/pictures"
    pictures = [{**drawn.to_data(), "url": f"{base}/{drawn.index}.png"} for drawn in job.pictures]
    return {**job.to_data(), "steps": job.steps, "pictures": pictures}


def _job_id(request: Request) -> str:
    return str(request.path_params["job_id"])


def _root(request: Request) -> str:
    return str(request.scope.get("root_path", ""))


def _known(what: str, value: object) -> Response:
    if value is None:
        return _error(503, "not_ready", f"the {what} is not known yet", hint="ask again when the service is loading")
    return _json(value)


def _event(name: str, data: object) -> bytes:
    return f"event: {name}\ndata: {msgspec.json.encode(data).decode()}\n\n".encode()


def _json(data: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    headers = {"cache-control": "no-store", **(headers or {})}
    return Response(msgspec.json.encode(data), status, headers, media_type="application/json")


def _error(status: int, code: str, message: str, *, hint: str | None = None, param: str | None = None) -> Response:
    error = {"code": code, "message": message, "hint": hint, "param": param}
    headers = {"retry-after": "5"} if status in (429, 503) else None
    return _json({"error": error}, status, headers)


def _on_error(_request: Request, error: Exception) -> Response:
    report = describe(error)
    status = STATUS_CODES.get(report.code, 500)
    return _error(status, report.code, report.message, hint=report.hint, param=report.param)


def _on_http_error(request: Request, error: HTTPException) -> Response:
    code = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}.get(error.status_code, "usage")
    message = f"{request.method} {request.url.path}: {error.detail}"
    return _error(error.status_code, code, message)
