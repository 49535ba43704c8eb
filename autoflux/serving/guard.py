"""What every request must pass first: it must be meant for this server and come from one of its own pages.

A server on localhost can be reached by any page in the user's browser: directly (a form that posts to 127.0.0.1), or by
a name that its owner points at 127.0.0.1 after the page has loaded (DNS rebinding). So the Host must be a name of ours,
and what changes something must come from the same host. Programs that are not browsers send no Origin and pass.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

import msgspec

from autoflux.errors import ErrorReport
from autoflux.serving.frontend import AsgiApp, Receive, Scope, Send

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")

SECURITY_HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"same-origin",
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
    # Pages load nothing from other servers: prompts and pictures stay here. A frontend that needs more sets its own.
    b"content-security-policy": (
        b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'; base-uri 'self'"
    ),
}


class Guard:
    """An ASGI application before another one.

    `bound_host` is the address the server listens on; when that is all addresses (0.0.0.0), any numeric address is
    accepted as Host, because rebinding needs a name.
    """

    def __init__(self, app: AsgiApp, bound_host: str = "127.0.0.1", allowed_hosts: Iterable[str] = ()) -> None:
        self._app = app
        self._hosts = {host.lower() for host in (*LOCAL_HOSTS, bound_host, *allowed_hosts)}
        self._any_address = bound_host in ("0.0.0.0", "::", "")  # noqa: S104 — asked, not bound

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is None:
            await self._app(scope, receive, _with_security_headers(send))
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": refusal.code})
        else:
            await _refuse(send, refusal)

    def _refusal(self, scope: Scope) -> ErrorReport | None:
        host = _header(scope, b"host")
        if not self._is_ours(host):
            hint = "start the server with --allow-host NAME to let it be reached by that name"
            return ErrorReport(code="forbidden_host", message=f"this server is not known as {host!r}", hint=hint)
        origin = _header(scope, b"origin")
        harmless = scope["type"] == "http" and scope["method"] in SAFE_METHODS
        if origin and not harmless and not _same_host(origin, host):
            return ErrorReport(code="forbidden_origin", message=f"requests from pages of {origin!r} are refused")
        return None

    def _is_ours(self, host: str) -> bool:
        name = _host_name(host)
        return name in self._hosts or (self._any_address and _is_address(name))


def _header(scope: Scope, name: bytes) -> str:
    values = [value for key, value in scope["headers"] if key == name]
    return values[0].decode("latin-1").strip() if len(values) == 1 else ""


def _host_name(host: str) -> str:
    """`[::1]:6006` → `::1`; "" for what is no host."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _same_host(origin: str, host: str) -> bool:
    try:
        return urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:
        return False


def _with_security_headers(send: Send) -> Send:
    async def send_with_headers(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", ()))
            present = {key.lower() for key, _ in headers}
            headers += [(key, value) for key, value in SECURITY_HEADERS.items() if key not in present]
            message = {**message, "headers": headers}
        await send(message)

    return send_with_headers


async def _refuse(send: Send, report: ErrorReport) -> None:
    body = msgspec.json.encode({"error": report})
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": body})
