"""Running the service behind a port until it is told to stop."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from autoflux.errors import AutofluxError, ServiceUnavailable
from autoflux.serving.service import Service

if TYPE_CHECKING:
    import uvicorn

    from autoflux.serving.frontend import AsgiApp

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def open_port(host: str, port: int) -> socket.socket:
    """Listen, so that from now on a browser waits instead of being refused. Port 0 takes a free one.

    Raises:
        ServiceUnavailable: the port is taken or not allowed, or the address is not one of this computer.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # elsewhere this option would let two servers share a port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(128)
    except (OSError, OverflowError) as error:
        listening.close()
        raise _unavailable(host, port, error) from error
    return listening


def _unavailable(host: str, port: int, error: Exception) -> ServiceUnavailable:
    code = error.errno if isinstance(error, OSError) else None
    if code == errno.EADDRINUSE:
        return ServiceUnavailable(
            f"port {port} on {host} is in use by another program",
            hint=f"stop that program, or choose another port: --port {port + 1}",
        )
    if code in (errno.EACCES, errno.EPERM):
        return ServiceUnavailable(
            f"port {port} is not allowed for this user", hint="choose one above 1023: --port 6006"
        )
    return ServiceUnavailable(
        f"cannot listen on {host}, port {port}: {getattr(error, 'strerror', None) or error}",
        hint="--host 127.0.0.1 always exists on this computer",
    )


class Stopping:
    """Why and whether the server is to stop: a signal, or an error."""

    def __init__(self) -> None:
        self.error: AutofluxError | None = None
        self.signal: int | None = None
        self._stop: Callable[[], None] | None = None

    def fail(self, error: AutofluxError) -> None:
        """Stop because of an error; the first one counts. From any thread."""
        self.error = self.error or error
        if self._stop:
            self._stop()

    def on_signal(self, number: int, _frame: FrameType | None) -> None:
        """Stop in order; the second time at once. The worker ends by itself when this process is gone."""
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number
        if self._stop:
            self._stop()

    def tell(self, stop: Callable[[], None]) -> None:
        """What to call; at once if stopping was asked for before."""
        self._stop = stop
        if self.error or self.signal:
            stop()

    @contextmanager
    def taking_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM come here."""
        before = {number: signal.signal(number, self.on_signal) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run_server(
    service: Service,
    listening: socket.socket,
    make_app: Callable[[], AsgiApp],
    stopping: Stopping,
) -> None:
    """Serve until a signal or an error; then stop the service. Call within `stopping.taking_signals()`.

    `make_app` is called here because importing the HTTP libraries takes half a second.
    """
    try:
        server = _make_server(make_app(), service)
        stopping.tell(lambda: setattr(server, "should_exit", True))
        asyncio.run(server.serve(sockets=[listening]))
    finally:
        listening.close()
        service.stop()


def _make_server(app: AsgiApp, service: Service) -> uvicorn.Server:
    import uvicorn  # noqa: PLC0415 — only when serving

    class Server(uvicorn.Server):
        """Leaves signals to us, and ends the service together with the connections."""

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # Streams that are cut now are no errors worth showing.
            logging.getLogger("uvicorn.error").disabled = True
            stopper = threading.Thread(target=service.stop, name="autoflux-stop")
            stopper.start()
            await super().shutdown(sockets)
            await asyncio.to_thread(stopper.join)

    return Server(
        uvicorn.Config(
            app,
            log_config=None,
            log_level="error",
            access_log=False,
            lifespan="on",
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=1,
        )
    )
