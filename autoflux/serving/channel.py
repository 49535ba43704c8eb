"""One end of the connection between the service and its worker."""

from __future__ import annotations

import threading
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

import msgspec

from autoflux.serving.messages import FromWorker, ToWorker

Out = TypeVar("Out")
In = TypeVar("In")


class Channel(Generic[Out, In]):
    """Typed messages over a byte connection. Any thread may send; one thread receives."""

    def __init__(self, connection: Connection, receives: Any) -> None:
        self._connection = connection
        self._decoder = msgspec.msgpack.Decoder(receives)
        self._lock = threading.Lock()

    def send(self, message: Out) -> None:
        """Raises OSError when the other end is gone."""
        data = msgspec.msgpack.encode(message)
        with self._lock:
            self._connection.send_bytes(data)

    def receive(self, timeout: float | None = None) -> In | None:
        """The next message, None when none came in `timeout` seconds. Raises EOFError or OSError at the end."""
        if timeout is not None and not self._connection.poll(timeout):
            return None
        message: In = self._decoder.decode(self._connection.recv_bytes())
        return message

    def close(self) -> None:
        self._connection.close()


def worker_end(connection: Connection) -> Channel[FromWorker, ToWorker]:
    """The channel as the worker process holds it."""
    return Channel(connection, ToWorker)


def service_end(connection: Connection) -> Channel[ToWorker, FromWorker]:
    """The channel as the service holds it."""
    return Channel(connection, FromWorker)
