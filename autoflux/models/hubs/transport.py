"""Speaking HTTP with a hub: patience with what passes by itself, and clear words for what does not."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx
import msgspec

from autoflux import __version__
from autoflux.errors import DamagedDownload, HubUnavailable
from autoflux.models.hubs.values import Source

PASSING_STATUS = (408, 425, 429, 500, 502, 503, 504)
"""Answers that may be another one soon."""

LISTING_LIMIT_BYTES = 64 << 20
"""A list of files longer than this is none."""

UNREACHED_TRIES = 2
"""Before anything has arrived, a hub that cannot be reached is one that somebody waits for in vain."""

ENDPOINTS = {Source.HUGGINGFACE: "HF_ENDPOINT", Source.MODELSCOPE: "MODELSCOPE_ENDPOINT"}
"""Variables that say where a hub is."""

T = TypeVar("T")


class Stopped(Exception):
    """The download was called off; what has arrived stays for the next one."""


class Passing(Exception):
    """A failure that may pass: worth another try."""

    def __init__(
        self,
        what: str,
        *,
        status: int | None = None,
        tries: int | None = None,
        wait_seconds: float | None = None,
        progressed: bool = False,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.status = status
        self.tries = tries
        self.wait_seconds = wait_seconds
        self.progressed = progressed


@dataclass(frozen=True)
class Patience:
    """How often and how long to wait: `tries` in a row without a new byte, the pauses doubling up to the longest."""

    tries: int = 5
    first_pause_seconds: float = 1.0
    longest_pause_seconds: float = 60.0

    def pause(self, failures: int, asked_seconds: float | None) -> float:
        """Seconds to wait after that many failures in a row; what the hub asks for counts, within limits."""
        usual = self.first_pause_seconds * 2 ** (failures - 1)
        return min(self.longest_pause_seconds, usual if asked_seconds is None else asked_seconds)


@dataclass(frozen=True)
class Wire:
    """A connection to one hub.

    `headers` carry the token. They go to the hub alone: httpx drops `Authorization` and `Cookie` when a redirect
    leads to another host or port.
    """

    client: httpx.Client
    source: Source
    endpoint: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    patience: Patience = field(default_factory=Patience)
    stop: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """Raises Stopped when the download was called off."""
        if self.stop.is_set():
            raise Stopped

    def get_json(self, path: str, refuse: Callable[[httpx.Response], None]) -> dict[str, Any]:
        """An object from the hub's API.

        Args:
            path: below the endpoint, with its query.
            refuse: raises what a status means that no further try will change.

        Raises:
            HubUnavailable: no answer, or none that makes sense.
        """
        return self.retrying(lambda: self._get_json(path, refuse))

    def retrying(self, attempt: Callable[[], T]) -> T:
        """Repeat what fails in passing. Raises HubUnavailable when patience ends, Stopped when called off."""
        failures = 0
        while True:
            self.check()
            try:
                return attempt()
            except Passing as error:
                failures = 1 if error.progressed else failures + 1
                if failures >= min(self.patience.tries, error.tries or self.patience.tries):
                    raise self.unavailable(error.what, error.status) from error
                pause = 0.0 if error.progressed else self.patience.pause(failures, error.wait_seconds)
                if pause and self.stop.wait(pause):
                    raise Stopped from error

    def unavailable(self, what: str, status: int | None = None) -> HubUnavailable:
        """What to raise about a hub that `what`; the status of its answer tells what to try."""
        again = "run the command again: it goes on where it stopped"
        if status == 429:
            hint = f"it was asked too often: wait some minutes, then {again}"
        elif status is not None and status >= 500:
            hint = f"the fault is on its side: later {again}, or take the model from {self.source.other.label} with "
            hint += f"--source {self.source.other}"
        else:
            hint = f"check the network, HTTPS_PROXY and {ENDPOINTS[self.source]}, then {again}"
        return HubUnavailable(f"{self.source.label} at {self.endpoint} {what}", hint=hint)

    def answered(self, status: int) -> HubUnavailable:
        """What to raise about an answer that nobody foresaw."""
        return self.unavailable(said(status), status)

    def _get_json(self, path: str, refuse: Callable[[httpx.Response], None]) -> dict[str, Any]:
        try:
            with self.client.stream("GET", self.endpoint + path, headers=self.headers) as response:
                raise_if_passing(response)
                refuse(response)
                if response.status_code != 200:
                    raise self.answered(response.status_code)
                data = self._read(response)
        except httpx.InvalidURL as error:
            raise self.unavailable(f"cannot be asked: {error}") from error
        except httpx.ConnectError as error:
            raise Passing(explain(error), tries=UNREACHED_TRIES) from error
        except httpx.TransportError as error:
            raise Passing(explain(error)) from error
        except httpx.HTTPError as error:
            raise self.unavailable(f"cannot be asked: {error}") from error
        try:
            return msgspec.json.decode(data, type=dict[str, Any])
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise self.unavailable("answered with something else than JSON; is the endpoint right?") from error

    def _read(self, response: httpx.Response) -> bytes:
        data = bytearray()
        for chunk in response.iter_bytes():
            self.check()
            data += chunk
            if len(data) > LISTING_LIMIT_BYTES:
                raise DamagedDownload(f"{self.source.label} sends a list of files without end; nothing was downloaded")
        return bytes(data)


def connect() -> httpx.Client:
    """A client that follows redirects and never asks for compression, so that ranges mean bytes of the file."""
    return httpx.Client(
        follow_redirects=True,
        max_redirects=10,
        timeout=httpx.Timeout(30.0, connect=15.0),
        headers={"User-Agent": f"autoflux/{__version__}", "Accept-Encoding": "identity"},
    )


def raise_if_passing(response: httpx.Response) -> None:
    """Raises Passing for an answer such as 429 or 503, with the wait that it asks for."""
    if response.status_code in PASSING_STATUS:
        wait = _wait(response.headers.get("Retry-After"))
        raise Passing(said(response.status_code), status=response.status_code, wait_seconds=wait)


def said(status: int) -> str:
    """A status in words, for a sentence that begins with the hub."""
    return f"answered {status} {httpx.codes.get_reason_phrase(status)}".rstrip()


def explain(error: httpx.TransportError) -> str:
    """What went wrong on the way, for a sentence that begins with the hub."""
    if isinstance(error, httpx.ConnectError):
        return f"cannot be reached: {_ERRNO.sub('', str(error))}"
    if isinstance(error, httpx.TimeoutException):
        return "does not answer in time"
    return f"broke off: {error}"


_ERRNO = re.compile(r"^\[Errno -?\d+\] ")


def _wait(retry_after: str | None) -> float | None:
    try:
        seconds = float(retry_after or "")
    except ValueError:  # absent, or a date, which clocks that differ make worthless
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None
